"""Win rates from a judge's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_rlaif.measures.intervals import bootstrap_mean


def win_rate(p: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Share of comparisons that A wins; exactly 0.5 is a tie and counts half.

    Args:
        p: N >= 1 probabilities that A is preferred, both orders already joined.
        seed: Of the bootstrap.

    Returns:
        ``win_rate``, ``interval`` (95%, bootstrap over the comparisons), ``wins``, ``ties``, ``losses``.
    """
    points = [0.5 if x == 0.5 else float(x > 0.5) for x in p]
    return {
        "win_rate": sum(points) / len(points),
        "interval": bootstrap_mean(points, seed=seed),
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
    }
