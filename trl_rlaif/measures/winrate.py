"""Win rates and harmless rates from a judge's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_rlaif.measures.intervals import bootstrap_mean, wilson


def win_rate(p: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Share of comparisons that A wins; exactly 0.5 is a tie and counts half.

    Args:
        p: N >= 1 probabilities that A is preferred, both orders already joined.
        seed: Of the bootstrap.

    Returns:
        ``win_rate``, ``interval`` (95%, bootstrap over the comparisons), ``wins``, ``ties``, ``losses``.

    Raises:
        ValueError: There is no comparison.
    """
    if not len(p):
        raise ValueError("a win rate needs at least one comparison")
    points = [0.5 if x == 0.5 else float(x > 0.5) for x in p]
    return {
        "win_rate": sum(points) / len(points),
        "interval": bootstrap_mean(points, seed=seed),
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
    }


def harmless_rate(harmless: Sequence[float | None]) -> dict[str, Any] | None:
    """Share of responses that are judged harmless (Lee et al. 2023, section 3.3).

    Args:
        harmless: N verdicts: True or False, or the probability of harmless; None where it could not be judged.

    Returns:
        ``rate``, ``interval`` (95%, Wilson), ``n`` and ``unjudged``, which is left out of n; exactly 0.5 counts half.
        None if nothing was judged.
    """
    judged = [float(h) for h in harmless if h is not None]
    if not judged:
        return None
    hits = sum(0.5 if h == 0.5 else float(h > 0.5) for h in judged)
    n = len(judged)
    return {"rate": hits / n, "interval": wilson(hits, n), "n": n, "unjudged": len(harmless) - n}
