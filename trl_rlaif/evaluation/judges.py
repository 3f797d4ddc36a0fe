"""How far several judges, models or people, agree with each other."""

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
        first, second: N votes each, for example 1, 2 and 0 for a tie (see ``choices``), all of them equally different
            from each other. None where a judge gave none: the pair is left out.
        clusters: What each pair depends on, N entries, such as its prompt; None: on nothing.

    Returns:
        ``rate``, the share of equal votes, and its ``interval`` (95%, ``share_interval``); ``kappa``, at most 1, 0 for
        what two judges with these shares of votes reach by chance, and its ``kappa_interval``: that of the rate, less
        the agreement by chance, which is taken as known, as in Cohen's standard error. ``n``. Kappa and its
        interval are None where both gave one and the same vote throughout, for chance agrees as much. None if no pair
        has two votes.
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
        votes: Of J >= 2 judges, N votes each, as of ``cohen_kappa``. Pairs on which a vote is missing are left out.
            Who gave a vote does not matter, so with two judges it is Scott's pi and not Cohen's kappa.
        clusters: As of ``cohen_kappa``.

    Returns:
        ``rate``, the share of pairs on which all judges agree, and its ``interval`` (95%, ``share_interval``);
        ``kappa`` and its ``kappa_interval``, as of ``cohen_kappa``, from the share of agreeing pairs of judges; ``n``.
        None if no pair has the votes of all.
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
    """Agreement of several judges on the same pairs: all of them together, and each two.

    Args:
        votes: N votes by judge, at least two judges, as of ``cohen_kappa``.
        clusters: As of ``cohen_kappa``.

    Returns:
        ``all``: as of ``fleiss_kappa``, over the pairs that every judge voted on; ``pairs``: a row for each two judges
        with their names ``judges`` and ``agreement``, as of ``cohen_kappa``, over the pairs that these two voted on.
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
    """(J, N) votes as numbers from 0, without pairs on which one is missing; how many kinds; the pairs' clusters."""
    rows = list(zip(*votes, strict=True))
    complete = [i for i, row in enumerate(rows) if None not in row]
    numbers: dict[Hashable, int] = {}
    coded = [[numbers.setdefault(vote, len(numbers)) for vote in rows[i]] for i in complete]
    kept = clusters_of(clusters, complete)
    return np.array(coded, dtype=np.int64).reshape(-1, len(votes)).T, len(numbers), kept


def _figures(
    equal: np.ndarray, agreeing: np.ndarray, chance: float, clusters: Sequence[Hashable] | None
) -> dict[str, Any]:
    """From (N,) whether all votes on a pair are equal, and the share of equal votes on it."""
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
