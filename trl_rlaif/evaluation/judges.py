"""Agreement among several judges, models or people."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from trl_rlaif.evaluation.intervals import clusters_of, share_interval


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], clusters: Sequence[Hashable] | None = None
) -> dict[str, Any] | None:
    """Agreement of two judges, and how far it exceeds chance (Cohen 1960, "A coefficient of agreement").

    Args:
        first, second: N votes each, for example 1, 2 and 0 for a tie (see ``choices``), treated as nominal. None if a
            judge gave none: the pair is left out.
        clusters: The cluster of each pair, N entries, such as its prompt; None: all independent.

    Returns:
        ``rate``, the fraction of equal votes, and its ``interval`` (95%, ``share_interval``); ``kappa``, at most 1, 0
        for the chance agreement of two judges with these vote distributions, and its ``kappa_interval``: that of the
        rate, corrected for chance agreement, which is taken as known, as in Cohen's standard error. ``n``. Kappa and
        its interval are None if both gave the same single vote throughout, since chance agreement is then 1. None if
        no pair has two votes.
    """
    coded, kinds, clusters = _coded([first, second], clusters)
    if not coded.shape[1]:
        return None
    equal = coded[0] == coded[1]
    chance = sum(float(np.prod((coded == kind).mean(axis=1))) for kind in range(kinds))
    return _figures(equal, equal, chance, clusters)


def fleiss_kappa(
    votes: Sequence[Sequence[Hashable]], clusters: Sequence[Hashable] | None = None
) -> dict[str, Any] | None:
    """Agreement of any number of judges beyond chance (Fleiss 1971, "Measuring nominal scale agreement").

    Args:
        votes: Of J >= 2 judges, N votes each, as in ``cohen_kappa``. Pairs with a missing vote are left out. Who gave a
            vote does not matter, so with two judges it is Scott's pi, not Cohen's kappa.
        clusters: As in ``cohen_kappa``.

    Returns:
        ``rate``, the fraction of pairs on which all judges agree, and its ``interval`` (95%, ``share_interval``);
        ``kappa`` and its ``kappa_interval``, as in ``cohen_kappa``, from the fraction of agreeing pairs of judges;
        ``n``. None if no pair has all votes.
    """
    if len(votes) < 2:
        raise ValueError("agreement needs at least two judges")
    coded, kinds, clusters = _coded(votes, clusters)
    if not coded.shape[1]:
        return None
    judges = len(votes)
    counts = np.stack([(coded == kind).sum(axis=0) for kind in range(kinds)])
    agreeing = ((counts**2).sum(axis=0) - judges) / (judges * (judges - 1))
    chance = float(((counts.mean(axis=1) / judges) ** 2).sum())
    return _figures((counts == judges).any(axis=0), agreeing, chance, clusters)


def judge_agreement(
    votes: Mapping[str, Sequence[Hashable]], clusters: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Agreement of several judges on the same pairs: overall and pairwise.

    Args:
        votes: N votes by judge, at least two judges, as in ``cohen_kappa``.
        clusters: As in ``cohen_kappa``.

    Returns:
        ``all``: as in ``fleiss_kappa``, over the pairs that every judge voted on; ``pairs``: a row for each two judges
        with their names ``judges`` and ``agreement``, as in ``cohen_kappa``, over the pairs that both voted on.
    """
    return {
        "all": fleiss_kappa(list(votes.values()), clusters),
        "pairs": [
            {"judges": (a, b), "agreement": cohen_kappa(votes[a], votes[b], clusters)}
            for a, b in combinations(votes, 2)
        ],
    }


def _coded(
    votes: Sequence[Sequence[Hashable]], clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, int, list[Hashable] | None]:
    """(J, N) votes as numbers from 0, without pairs with a missing one; the number of kinds; the pairs' clusters."""
    rows = list(zip(*votes, strict=True))
    complete = [i for i, row in enumerate(rows) if None not in row]
    numbers: dict[Hashable, int] = {}
    coded = [[numbers.setdefault(vote, len(numbers)) for vote in rows[i]] for i in complete]
    kept = clusters_of(clusters, complete)
    return np.array(coded, dtype=np.int64).reshape(-1, len(votes)).T, len(numbers), kept


def _figures(
    equal: np.ndarray, agreeing: np.ndarray, chance: float, clusters: Sequence[Hashable] | None
) -> dict[str, Any]:
    """From (N,) whether all votes on a pair are equal, and the fraction of equal votes on it."""
    kappa, ends = None, None
    if chance < 1:
        kappa, *ends = (
            (share - chance) / (1 - chance) for share in (agreeing.mean(), *share_interval(agreeing, clusters))
        )
    return {
        "rate": float(equal.mean()),
        "interval": share_interval(equal, clusters),
        "kappa": kappa if kappa is None else float(kappa),
        "kappa_interval": ends and tuple(ends),
        "n": len(equal),
    }
