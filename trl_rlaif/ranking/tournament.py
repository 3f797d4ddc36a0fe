"""Which comparison to ask next: the one that minimizes the expected number of pairs in the wrong order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, owens_t
from scipy.stats import norm

from trl_rlaif.ranking.bradley_terry import Comparisons, Strengths, fit

# By default, a tournament asks one in SHARE of the questions about a group, which are its pairs in both orders.
SHARE = 3
# Maximum of pairs x pairs over the groups that are processed together.
_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Asked:
    """A question about a group: is the first item better than the second one?"""

    group: int
    first: int
    second: int


Ask = Callable[[list[Asked]], Sequence[float | None]]
"""Answers each question with the probability that its first item is better; None if there is no answer."""


@dataclass(frozen=True)
class Ranking:
    """Result of a tournament.

    Args:
        strengths: Strengths of all items.
        asked: The questions, in the order in which they were asked.
        answers: Answers, in the same order.
    """

    strengths: Strengths
    asked: list[Asked]
    answers: list[float | None]


def default_questions(size: int) -> int:
    """A third of all questions about K items in both orders, and at least as many as connect them."""
    return max(size - 1, size * (size - 1) // SHARE)


def rank_all(ask: Ask, sizes: Sequence[int]) -> Ranking:
    """Ask about every pair of every group in both orders.

    Args:
        ask: Function that answers questions.
        sizes: Number of items of each group.
    """
    asked = [Asked(g, i, j) for g, size in enumerate(sizes) for i in range(size) for j in range(size) if i != j]
    answers = list(ask(asked))
    return Ranking(_fitted(asked, answers, sizes), asked, answers)


def rank_by_tournament(
    ask: Ask, sizes: Sequence[int], *, questions: int | None = None, at_once: int = 1, confidence: float = 1.0
) -> Ranking:
    """Ask in rounds, each about the pairs whose answers are expected to correct the most, given those so far.

    A round asks up to ``at_once`` questions about each group, for all groups together. It is deterministic: the same
    answers lead to the same questions.

    Args:
        ask: Function that answers questions.
        sizes: Number of items of each group.
        questions: Budget per group; None: a third of all its pairs in both orders (``default_questions``).
        at_once: Questions per group and round. A larger number means fewer, less informed rounds.
        confidence: Stop asking about a group once the order of each of its pairs has this probability.
    """
    schedule = _Schedule(sizes, questions, at_once, confidence)
    asked: list[Asked] = []
    answers: list[float | None] = []
    strengths = _fitted(asked, answers, sizes)
    while new := schedule.next(strengths):
        asked += new
        answers += ask(new)
        strengths = _fitted(asked, answers, sizes)
    return Ranking(strengths, asked, answers)


def _fitted(asked: Sequence[Asked], answers: Sequence[float | None], sizes: Sequence[int]) -> Strengths:
    known = [(q.group, q.first, q.second, p) for q, p in zip(asked, answers, strict=True) if p is not None]
    group, first, second, p = np.array(known, dtype=np.float64).reshape(-1, 4).T
    items = {"group": group, "first": first, "second": second}
    return fit(Comparisons(**{k: v.astype(np.int64) for k, v in items.items()}, p=p, position=np.ones_like(p)), sizes)


class _Schedule:
    """The questions asked about each group, and the next ones."""

    def __init__(self, sizes: Sequence[int], questions: int | None, at_once: int, confidence: float) -> None:
        size = max(sizes, default=0)
        self.one, self.other = np.triu_indices(size, 1)
        self.left = np.array(
            [min(n * (n - 1), default_questions(n) if questions is None else questions) for n in sizes], dtype=np.int64
        )
        self.exists = self.other[None] < np.array(sizes, dtype=np.int64)[:, None]
        # For each pair, whether it was asked with `one` first, and with `other` first.
        self.asked: np.ndarray = np.zeros((2, len(sizes), len(self.one)), dtype=bool)
        self.shown_first: np.ndarray = np.zeros((len(sizes), size), dtype=np.int64)  # more often than second
        self.at_once, self.confidence = at_once, confidence

    def next(self, strengths: Strengths) -> list[Asked]:
        """The questions of a round; empty if every group is done."""
        open_groups = np.flatnonzero(self.left > 0)
        rows = max(1, _AT_ONCE // max(1, len(self.one)) ** 2)
        found = [self._of(open_groups[i : i + rows], strengths) for i in range(0, len(open_groups), rows)]
        return [asked for part in found for asked in part]

    def _of(self, groups: np.ndarray, strengths: Strengths) -> list[Asked]:
        prospect = _Prospect(groups, self.one, self.other, strengths, self.exists[groups])
        settled = prospect.wrong.max(axis=1, initial=0) <= 1 - self.confidence
        self.left[groups[settled]] = 0
        found = []
        for _ in range(self.at_once):
            gains = np.where(self.exists[groups] & ~self.asked[:, groups].all(axis=0), prospect.gains(), -np.inf)
            chosen = gains.argmax(axis=1)
            found += [self._take(g, c) for g, c in zip(groups.tolist(), chosen.tolist(), strict=True) if self.left[g]]
            prospect.take(chosen)
        return found

    def _take(self, group: int, pair: int) -> Asked:
        """Ask about a pair, first showing the item shown first less often, so that a prompt's own bias also cancels."""
        one, other = int(self.one[pair]), int(self.other[pair])
        turned = bool(self.asked[0, group, pair])
        if not self.asked[:, group, pair].any():
            more = self.shown_first[group, one] - self.shown_first[group, other]
            turned = bool(more > 0 or (more == 0 and (group + pair) % 2))
        first, second = (other, one) if turned else (one, other)
        self.asked[int(turned), group, pair] = True
        self.shown_first[group, [first, second]] += (1, -1)
        self.left[group] -= 1
        return Asked(group, first, second)


class _Prospect:
    """Expected number of pairs of each group in the wrong order, now and after another answer.

    A difference d with standard error s has the wrong sign with probability Phi(-|d| / s). An answer reduces s^2 by
    some D, which is known in advance, and moves d by a normal deviate of variance D. The sign of d is then wrong with
    probability 2 T(d / s, sqrt(s^2 / D - 1)), where T is Owen's T (Owen 1956). The answer that reduces the sum over all
    pairs most is the choice of the knowledge gradient (Frazier, Powell and Dayanik 2008).
    """

    def __init__(
        self, groups: np.ndarray, one: np.ndarray, other: np.ndarray, strengths: Strengths, exists: np.ndarray
    ) -> None:
        values, covariance = strengths.values[groups], strengths.covariance[groups]
        design = np.zeros((len(one), values.shape[1]))
        design[range(len(one)), one], design[range(len(one)), other] = 1, -1
        difference = values @ design.T
        self.covariance = design @ covariance @ design.T  # of the differences, (groups, pairs, pairs)
        self.variance = self._variances()
        self.ratio = difference / np.sqrt(self.variance)
        self.exists = exists
        self.wrong = np.where(exists, norm.cdf(-np.abs(self.ratio)), 0)
        p = expit(difference)
        self.noise = strengths.dispersion / (p * (1 - p))

    def _variances(self) -> np.ndarray:
        return np.maximum(np.diagonal(self.covariance, axis1=1, axis2=2), 1e-12)

    def gains(self) -> np.ndarray:
        """Reduction of the expected number of wrong pairs by an answer about each pair, (groups, pairs)."""
        now = self._variances()
        reduction = self.covariance**2 / (now + self.noise)[:, None, :]  # of each pair's variance by each answer
        reduction += (self.variance - now)[:, :, None]
        with np.errstate(divide="ignore"):
            rest = np.sqrt(np.maximum(self.variance[:, :, None] / reduction - 1, 0))
        after = 2 * owens_t(self.ratio[:, :, None], rest)
        return np.where(self.exists[:, :, None], self.wrong[:, :, None] - after, 0).sum(axis=1)

    def take(self, chosen: np.ndarray) -> None:
        """Update the covariance as after an answer about one pair of each group."""
        rows = np.arange(len(chosen))
        column = self.covariance[rows, :, chosen]
        scale = column[rows, chosen] + self.noise[rows, chosen]
        self.covariance = self.covariance - column[:, :, None] * column[:, None, :] / scale[:, None, None]
