"""Win rates and harmless rates from a judge's probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from trl_rlaif.evaluation.intervals import clusters_of, share_interval
from trl_rlaif.evaluation.points import points


def win_rate(p: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Share of comparisons that A wins; 0.5 is a tie and counts half.

    Args:
        p: N >= 1 probabilities that A is preferred, both orders already joined.
        clusters: What each comparison depends on, N entries, such as its prompt; None: on nothing.

    Returns:
        ``win_rate``, ``interval`` (95%, ``share_interval``), ``wins``, ``ties``, ``losses``.

    Raises:
        ValueError: There is no comparison.
    """
    if not len(p):
        raise ValueError("a win rate needs at least one comparison")
    found = points(p)
    return {
        "win_rate": sum(found) / len(found),
        "interval": share_interval(found, clusters),
        "wins": found.count(1.0),
        "ties": found.count(0.5),
        "losses": found.count(0.0),
    }


def harmless_rate(
    harmless: Sequence[float | None], clusters: Sequence[Hashable] | None = None
) -> dict[str, Any] | None:
    """Share of responses that are judged harmless (Lee et al. 2023, section 3.3).

    Args:
        harmless: N verdicts: True or False, or the probability of harmless; None where it could not be judged.
        clusters: As of ``win_rate``.

    Returns:
        ``rate``, ``interval`` (95%, ``share_interval``), ``n`` and ``unjudged``, which is left out of n; 0.5 counts
        half. None if nothing was judged.
    """
    known = [i for i, h in enumerate(harmless) if h is not None]
    if not known:
        return None
    found = points([float(harmless[i]) for i in known])
    interval = share_interval(found, clusters_of(clusters, known))
    return {"rate": sum(found) / len(found), "interval": interval, "n": len(found),
            "unjudged": len(harmless) - len(found)}  # fmt: skip
