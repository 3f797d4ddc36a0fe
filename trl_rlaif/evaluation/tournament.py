"""Everybody against everybody: win rates of several policies on the same prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_rlaif.evaluation.intervals import clusters_of, share_interval
from trl_rlaif.evaluation.points import points
from trl_rlaif.evaluation.win_rate import win_rate


def all_against_all(
    names: Sequence[str],
    p: Mapping[tuple[str, str], Sequence[float | None]],
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Win rates of every policy over every other one, and over all of them together.

    Args:
        names: M >= 2 policies.
        p: For each two of them, in either order, N >= 1 probabilities that the first is preferred, one a prompt in the
            same order of prompts; None where it could not be judged. 0.5 is a tie and counts half.
        clusters: What each prompt depends on, N entries, such as its text; None: on nothing.

    Returns:
        ``pairs``: {A: {B: ``win_rate`` of A over B, ``interval``, ``wins``, ``ties``, ``losses``, ``unjudged``}}, None
        in place of the numbers where nothing was judged. ``overall``: {A: ``win_rate``, ``interval``, ``n``}, the mean
        over the prompts of A's mean over its opponents, so that every opponent counts alike; its interval (95%,
        ``share_interval``) is over the prompts, since the comparisons on one prompt depend on each other.
        ``n`` counts the prompts on which A was judged against somebody.

    Raises:
        ValueError: Two policies lack their comparison, or have it twice, or the numbers of prompts differ.
    """
    table = {name: {other: None for other in names if other != name} for name in names}
    won = {name: [] for name in names}
    lengths = {len(values) for values in p.values()}
    if len(lengths) > 1:
        raise ValueError(f"the comparisons have different numbers of prompts: {sorted(lengths)}")
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if ((name, other) in p) == ((other, name) in p):
                raise ValueError(f"there must be one comparison of {name} and {other}")
            values = p[name, other] if (name, other) in p else _turned(p[other, name])
            for one, another, found in ((name, other, values), (other, name, _turned(values))):
                table[one][another] = _numbers(found, clusters)
                won[one].append([np.nan if x is None else points([x])[0] for x in found])
    return {"pairs": table, "overall": {name: _overall(np.array(rows), clusters) for name, rows in won.items()}}


def _turned(p: Sequence[float | None]) -> list[float | None]:
    return [None if x is None else 1 - x for x in p]


def _numbers(p: Sequence[float | None], clusters: Sequence[Hashable] | None) -> dict[str, Any] | None:
    judged = [i for i, x in enumerate(p) if x is not None]
    if not judged:
        return None
    found = win_rate([p[i] for i in judged], clusters_of(clusters, judged))
    return found | {"unjudged": len(p) - len(judged)}


def _overall(won: np.ndarray, clusters: Sequence[Hashable] | None) -> dict[str, Any] | None:
    """From (opponents, prompts) points, NaN where they are not known."""
    known = ~np.isnan(won)
    judged = known.any(axis=0)
    if not judged.any():
        return None
    means = np.where(known, won, 0).sum(axis=0)[judged] / known.sum(axis=0)[judged]
    interval = share_interval(means, clusters_of(clusters, np.flatnonzero(judged)))
    return {"win_rate": float(means.mean()), "interval": interval, "n": len(means)}
