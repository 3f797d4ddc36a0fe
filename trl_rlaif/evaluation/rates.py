"""Shares of wins: of one policy over another, of everybody over everybody, of a reward model, of what is harmless.

A win counts 1, a loss 0 and a tie one half, in every measure that counts wins or agreement.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_rlaif.evaluation.categories import by_category
from trl_rlaif.evaluation.intervals import clusters_of, share_interval

# A mean over both orders may miss one half by its last digits.
_EVEN = 1e-9


def is_even(p: Any) -> Any:
    """Whether a probability prefers neither side, up to 1e-9: a bool, or one for each element of an array."""
    return abs(p - 0.5) < _EVEN


def points(p: Sequence[float]) -> list[float]:
    """Probabilities that the first is preferred as what the first gets: 1, 0, or 0.5 for a tie."""
    return [0.5 if is_even(x) else float(x > 0.5) for x in p]


def choices(p: Sequence[float | None]) -> list[int | None]:
    """Probabilities that response_1 is preferred as votes: 1, 2, or 0 for a tie; None stays None."""
    return [None if x is None else 0 if is_even(x) else 1 if x > 0.5 else 2 for x in p]


def agreement_points(p: Sequence[float], human: Sequence[int]) -> list[float]:
    """What each label gets for its agreement with a person's choice.

    Args:
        p: N probabilities that response_1 is preferred.
        human: N choices: 1, 2, or 0 for a tie.

    Returns:
        1 where both prefer the same response, 0 where they prefer different ones, 0.5 where either is a tie.
    """
    found = zip(points(p), human, strict=True)
    return [0.5 if h == 0 else x if h == 1 else 1 - x for x, h in found]


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


def pairwise_accuracy(
    chosen: Sequence[float],
    rejected: Sequence[float],
    categories: Sequence[str | None] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any] | None:
    """Share of pairs in which a reward model scores the preferred response higher (Lee et al. 2023).

    Args:
        chosen, rejected: N scores each, of any reward model; infinite ones are scores too.
        categories: N kinds of prompt, or None.
        clusters: What each pair depends on, N entries, such as its prompt; None: on nothing.

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
    """From (opponents, prompts) points, NaN where they are not known."""
    known = ~np.isnan(won)
    judged = known.any(axis=0)
    if not judged.any():
        return None
    means = np.where(known, won, 0).sum(axis=0)[judged] / known.sum(axis=0)[judged]
    interval = share_interval(means, clusters_of(clusters, np.flatnonzero(judged)))
    return {"win_rate": float(means.mean()), "interval": interval, "n": len(means)}
