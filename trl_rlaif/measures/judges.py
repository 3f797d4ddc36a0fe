"""How far several judges, models or people, agree with each other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from trl_rlaif.measures.intervals import bootstrap, wilson


def choices(p: Sequence[float | None]) -> list[int | None]:
    """Probabilities that response_1 is preferred as votes: 1, 2, or 0 for a tie at exactly 0.5; None stays None."""
    return [None if x is None else 0 if x == 0.5 else 1 if x > 0.5 else 2 for x in p]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], *, seed: int = 0) -> dict[str, Any] | None:
    """Agreement of two judges, and how far it exceeds chance (Cohen 1960, "A coefficient of agreement").

    Args:
        first, second: N votes each, for example 1, 2 and 0 for a tie (see ``choices``), all of them equally different
            from each other. None where a judge gave none: the pair is left out.
        seed: Of the bootstrap.

    Returns:
        ``rate``, the share of equal votes, and its ``interval`` (95%, Wilson); ``kappa``, at most 1, 0 for what two
        judges with these shares of votes reach by chance, and its ``kappa_interval`` (95%, bootstrap over the pairs);
        ``n``. Kappa is None where both gave one and the same vote throughout, for chance agrees as much; so is its
        interval where that happens in many resamples. None if no pair has two votes.
    """
    coded, kinds = _coded([first, second])
    if not coded.shape[1]:
        return None
    equal = coded[0] == coded[1]
    given = [[judge == kind for judge in coded] for kind in range(kinds)]

    def kappa(draws: np.ndarray) -> np.ndarray:
        chance = sum(a[draws].mean(axis=1) * b[draws].mean(axis=1) for a, b in given)
        return _beyond_chance(equal[draws].mean(axis=1), chance)

    return _figures(equal, kappa, seed)


def fleiss_kappa(votes: Sequence[Sequence[Hashable]], *, seed: int = 0) -> dict[str, Any] | None:
    """Agreement of any number of judges beyond chance (Fleiss 1971, "Measuring nominal scale agreement").

    Args:
        votes: Of J >= 2 judges, N votes each, as of ``cohen_kappa``. Pairs on which a vote is missing are left out.
            Who gave a vote does not matter, so with two judges it is Scott's pi and not Cohen's kappa.
        seed: Of the bootstrap.

    Returns:
        ``rate``, the share of pairs on which all judges agree, and its ``interval`` (95%, Wilson); ``kappa`` and its
        ``kappa_interval`` (95%, bootstrap over the pairs), None as of ``cohen_kappa``; ``n``. None if no pair has the
        votes of all.
    """
    if len(votes) < 2:
        raise ValueError("agreement needs at least two judges")
    coded, kinds = _coded(votes)
    if not coded.shape[1]:
        return None
    judges = len(votes)
    counts = np.stack([(coded == kind).sum(axis=0) for kind in range(kinds)])
    agreeing = ((counts**2).sum(axis=0) - judges) / (judges * (judges - 1))

    def kappa(draws: np.ndarray) -> np.ndarray:
        chance = sum((count[draws].mean(axis=1) / judges) ** 2 for count in counts)
        return _beyond_chance(agreeing[draws].mean(axis=1), chance)

    return _figures((counts == judges).any(axis=0), kappa, seed)


def judge_agreement(votes: Mapping[str, Sequence[Hashable]], *, seed: int = 0) -> dict[str, Any]:
    """Agreement of several judges on the same pairs: all of them together, and each two.

    Args:
        votes: N votes by judge, at least two judges, as of ``cohen_kappa``.
        seed: Of the bootstrap.

    Returns:
        ``all``: as of ``fleiss_kappa``, over the pairs that every judge voted on; ``pairs``: a row for each two judges
        with their names ``judges`` and ``agreement``, as of ``cohen_kappa``, over the pairs that these two voted on.
    """
    return {
        "all": fleiss_kappa(list(votes.values()), seed=seed),
        "pairs": [
            {"judges": (a, b), "agreement": cohen_kappa(votes[a], votes[b], seed=seed)}
            for a, b in combinations(votes, 2)
        ],
    }


def _coded(votes: Sequence[Sequence[Hashable]]) -> tuple[np.ndarray, int]:
    """(J, N) votes as numbers from 0, without the pairs on which one is missing; and how many kinds there are."""
    complete = [row for row in zip(*votes, strict=True) if None not in row]
    numbers: dict[Hashable, int] = {}
    coded = [[numbers.setdefault(vote, len(numbers)) for vote in row] for row in complete]
    return np.array(coded, dtype=np.int64).reshape(-1, len(votes)).T, len(numbers)


def _beyond_chance(observed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(observed - chance) / (1 - chance); NaN where chance agrees always."""
    room = 1 - chance
    return np.divide(observed - chance, room, out=np.full_like(room, np.nan), where=room > 0)


def _figures(equal: np.ndarray, kappa: Any, seed: int) -> dict[str, Any]:
    n, hits = len(equal), int(equal.sum())
    value = float(kappa(np.arange(n)[None])[0])
    return {
        "rate": hits / n,
        "interval": wilson(hits, n),
        "kappa": None if np.isnan(value) else value,
        "kappa_interval": bootstrap(kappa, n, seed=seed),
        "n": n,
    }
