"""Win rates of policies, pairwise accuracy of reward models, and harmless rates.

A win counts 1, a loss 0 and a tie one half, in every metric of wins or agreement.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_rlaif.evaluation.categories import by_category
from trl_rlaif.evaluation.intervals import clusters_of, share_interval

# A mean over both orders may differ from one half in its last digits.
_EVEN = 1e-9


def is_even(p: Any) -> Any:
    """Whether a probability prefers neither side, up to 1e-9: a bool, or one for each element of an array."""
    return abs(p - 0.5) < _EVEN


def points(p: Sequence[float]) -> list[float]:
    """From probabilities that the first is preferred to its points: 1, 0, or 0.5 for a tie."""
    return [0.5 if is_even(x) else float(x > 0.5) for x in p]


def choices(p: Sequence[float | None]) -> list[int | None]:
    """From probabilities that response_1 is preferred to votes: 1, 2, or 0 for a tie; None stays None."""
    return [None if x is None else 0 if is_even(x) else 1 if x > 0.5 else 2 for x in p]


def agreement_points(p: Sequence[float], human: Sequence[int]) -> list[float]:
    """Points of each label for agreeing with a human choice.

    Args:
        p: N probabilities that response_1 is preferred.
        human: N choices: 1, 2, or 0 for a tie.

    Returns:
        1 if both prefer the same response, 0 if they prefer different ones, 0.5 if either is a tie.
    """
    found = zip(points(p), human, strict=True)
    return [0.5 if h == 0 else x if h == 1 else 1 - x for x, h in found]


def win_rate(p: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Fraction of comparisons that A wins; 0.5 is a tie and counts half.

    Args:
        p: N >= 1 probabilities that A is preferred, both orders already combined.
        clusters: The cluster of each comparison, N entries, such as its prompt; None: all independent.

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
    """Fraction of responses judged harmless (Lee et al. 2023, section 3.3).

    Args:
        harmless: N verdicts: True or False, or the probability of harmless; None if not judged.
        clusters: As in ``win_rate``.

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


def pairwise_accuracy(
    chosen: Sequence[float],
    rejected: Sequence[float],
    categories: Sequence[str | None] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any] | None:
    """Fraction of pairs in which a reward model scores the preferred response higher (Lee et al. 2023).

    Args:
        chosen, rejected: N scores each, of any reward model; infinite scores are allowed.
        categories: N prompt categories, or None.
        clusters: The cluster of each pair, N entries, such as its prompt; None: all independent.

    Returns:
        ``rate``, ``interval`` (95%, ``share_interval``), ``n`` and ``ties``, equal scores, which count half;
        and with categories ``by_category``, the same for each of them. None without pairs.
    """
    pairs = list(zip(chosen, rejected, strict=True))
    if any(math.isnan(score) for pair in pairs for score in pair):
        raise ValueError("a score is NaN: it is neither higher nor lower than another")
    if not pairs:
        return None
    right = [0.5 if c == r else float(c > r) for c, r in pairs]
    found = {
        "rate": sum(right) / len(right),
        "interval": share_interval(right, clusters),
        "n": len(right),
        "ties": right.count(0.5),
    }
    if categories is not None:
        alone = range(len(pairs)) if clusters is None else clusters
        found["by_category"] = by_category(
            lambda c, r, of: pairwise_accuracy(c, r, clusters=of), categories, chosen, rejected, alone
        )
    return found


def all_against_all(
    names: Sequence[str],
    p: Mapping[tuple[str, str], Sequence[float | None]],
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Win rates of every policy over every other one, and over all others combined.

    Args:
        names: M >= 2 policies.
        p: For each two of them, in either order, N >= 1 probabilities that the first is preferred, one per prompt in
            the same order of prompts; None if not judged. 0.5 is a tie and counts half.
        clusters: The cluster of each prompt, N entries, such as its text; None: all independent.

    Returns:
        ``pairs``: {A: {B: ``win_rate`` of A over B, ``interval``, ``wins``, ``ties``, ``losses``, ``unjudged``}}, None
        instead of the numbers if nothing was judged. ``overall``: {A: ``win_rate``, ``interval``, ``n``}, the mean over
        the prompts of A's mean over its opponents, so that every opponent has equal weight; its interval (95%,
        ``share_interval``) is over the prompts, since the comparisons on one prompt are dependent. ``n`` counts the
        prompts on which A was judged against any opponent.

    Raises:
        ValueError: The comparison of two policies is missing or given twice, or the numbers of prompts differ.
    """
    table = {name: {other: None for other in names if other != name} for name in names}
    won: dict[str, list[list[float]]] = {name: [] for name in names}
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
    """From (opponents, prompts) points, NaN where unknown."""
    known = ~np.isnan(won)
    judged = known.any(axis=0)
    if not judged.any():
        return None
    means = np.where(known, won, 0).sum(axis=0)[judged] / known.sum(axis=0)[judged]
    interval = share_interval(means, clusters_of(clusters, np.flatnonzero(judged)))
    return {"win_rate": float(means.mean()), "interval": interval, "n": len(means)}
