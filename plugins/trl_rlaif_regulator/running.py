"""Mean and standard deviation of each category's scores; few scores are steadied by the other categories."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its subpackages are imported on first use

POOLED = ""
UNNAMED = None  # in a state
# Degrees of freedom from which a spread is known well enough (to about a fifth).
ENOUGH = 16
# Of a mean square: float64's, some times over. What float32 scores can tell apart is above it.
_ROUNDING = 1e-14
# Half of the fewest degrees of freedom that a prior of the variances may have; fewer than any that counts.
_LEAST = 0.01


@dataclass
class Moments:
    """Exponentially weighted mean and variance, corrected for their start at nothing.

    A batch's scores come in together: with ``share`` s of a new score, n of them replace 1 - (1 - s)^n of the past.
    Sums of weights stand beside the weighted sums, which is the bias correction of Adam (Kingma and Ba 2015).
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, values: list[float], share: float) -> None:
        """Take in a batch of scores, at least one."""
        keep = (1 - share) ** len(values)
        new = 1 - keep  # one number in all three: what rounding does to a small one cancels
        mean, square = sum(values) / len(values), sum(v * v for v in values) / len(values)
        self.weight = keep * self.weight + new
        self.total = keep * self.total + new * mean
        self.squares = keep * self.squares + new * square
        self.count += len(values)

    @property
    def mean(self) -> float:
        return self.total / self.weight

    @property
    def second(self) -> float:
        """Mean square."""
        return self.squares / self.weight

    @property
    def variance(self) -> float:
        """Mean square of the deviations from the mean; 0 where it is no more than the rounding of equal scores."""
        variance = self.second - self.mean**2
        return variance if variance > _ROUNDING * self.second else 0.0


class RunningScores:
    """Mean and standard deviation of the scores of each category.

    Args:
        share: Of one new score in the running figures, 0 < share < 1.
        prior: The figures of the other categories count as this many scores of a category at most: as many where
            categories are alike, ever fewer the more they differ. 0 leaves every category to itself.
    """

    def __init__(self, share: float, prior: float) -> None:
        self.share, self.prior = share, prior
        self.moments: dict[str, Moments] = {}
        self.unnamed = Moments()  # of the scores without a category

    def add(self, scores: Iterable[tuple[str | None, float]]) -> None:
        """Take in a batch of scores with their categories."""
        rows: dict[str, list[float]] = defaultdict(list)
        scores = list(scores)
        for category, score in scores:
            rows[POOLED].append(score)
            if category:
                rows[category].append(score)
        for name, values in rows.items():
            self.moments.setdefault(name, Moments()).add(values, self.share)
        unnamed = [score for category, score in scores if not category]
        if unnamed:
            self.unnamed.add(unnamed, self.share)

    def own(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a known category alone."""
        return self.moments[name].mean, math.sqrt(self.moments[name].variance)

    def pooled(self) -> tuple[float, float]:
        """Mean and standard deviation of all scores together, whatever their category: (0, 1) before the first."""
        return self.own(POOLED) if self.moments else (0.0, 1.0)

    def within(self) -> tuple[float, bool]:
        """Standard deviation of the scores about their own category's mean, 0 before the first.

        Returns:
            It, and whether it comes from enough scores; until then it is that of all scores together.
        """
        own = list(self._kinds().values())
        free = sum(self._size(m) - 1 for m in own)
        if free < ENOUGH:
            return (self.pooled()[1] if own else 0.0), False
        return math.sqrt(sum(self._size(m) * m.variance for m in own) / free), True

    def figures(self, category: str | None) -> tuple[float, float]:
        """Mean and standard deviation of a category as ``table`` has them; of one never seen, the pooled ones."""
        return self.table().get(category or UNNAMED, self.pooled())

    def table(self) -> dict[str | None, tuple[float, float]]:
        """Mean and standard deviation of every category; None stands for the scores without one.

        Empirical Bayes, in which the spread between categories is no part of the spread within them: means are drawn
        to a common one as far as they may differ by chance (one-way random effects), and so are variances, on their
        logarithmic scale (Smyth 2004, section 6.2).
        """
        kinds = self._kinds()
        if not sum(self._size(m) > 1 for m in kinds.values()):
            return {name: self.pooled() for name in kinds}
        sizes = np.array([self._size(m) for m in kinds.values()])
        means = np.array([m.mean for m in kinds.values()])
        variances = self._variances(sizes, np.array([m.variance for m in kinds.values()]))
        if not self.prior or not variances.all():
            drawn = means
        else:
            common, between = _random_effects(means, variances / sizes)
            # A prior of k scores: its mean's variance is that of the mean of k scores.
            prior = np.minimum(self.prior, variances / between) if between else self.prior
            drawn = (sizes * means + prior * common) / (sizes + prior)
        return dict(zip(kinds, zip(drawn.tolist(), np.sqrt(variances).tolist(), strict=True), strict=True))

    def _variances(self, sizes: np.ndarray, variances: np.ndarray) -> np.ndarray:
        """(C,) posterior variances: a scaled inverse chi-square prior, whose weight and place the categories tell."""
        free: np.ndarray = sizes - 1
        squares = sizes * variances
        known = (free > 0) & (squares > 0)
        if not known.any():
            return np.zeros_like(squares)
        half = free[known] / 2
        # log s^2 of normal scores has these moments about log sigma^2.
        logs = np.log(squares[known] / free[known]) - scipy.special.digamma(half) + np.log(half)
        common, spread = _random_effects(logs, scipy.special.polygamma(1, half))
        half_prior = _inverse_trigamma(spread)
        place = math.exp(
            common + (scipy.special.digamma(half_prior) - math.log(half_prior) if half_prior < math.inf else 0.0)
        )
        weight = min(self.prior, 2 * half_prior) if len(sizes) > 1 else 0.0
        # Without a prior one score alone has no spread.
        return np.where(weight + free > 0, (weight * place + squares) / np.maximum(weight + free, 1e-9), place)

    def _kinds(self) -> dict[str | None, Moments]:
        named: dict[str | None, Moments] = {name: moments for name, moments in self.moments.items() if name != POOLED}
        return named | {UNNAMED: self.unnamed} if self.unnamed.count else named

    def _size(self, moments: Moments) -> float:
        """Scores that running figures remember: a category of long ago is still known as well as a fresh one."""
        return min(moments.count, 1 / self.share)

    def state_dict(self) -> dict[str, Any]:
        """The figures of every category."""
        found: dict[Any, Any] = {name: (m.weight, m.total, m.squares, m.count) for name, m in self.moments.items()}
        u = self.unnamed
        return found | {UNNAMED: (u.weight, u.total, u.squares, u.count)} if u.count else found

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.moments = {name: Moments(*values) for name, values in state.items() if name != UNNAMED}
        self.unnamed = Moments(*state.get(UNNAMED, ()))


def _random_effects(values: np.ndarray, variances: np.ndarray) -> tuple[float, float]:
    """Common mean of (C,) values with errors of known variances, and the variance of the true values about it.

    That variance is what leaves C - 1 in the weighted sum of squares, or 0 (Paule and Mandel 1982; a single value tells
    nothing of it).
    """

    def common(between: float) -> float:
        return np.average(values, weights=1 / (variances + between))

    def excess(between: float) -> float:
        return ((values - common(between)) ** 2 / (variances + between)).sum() - (len(values) - 1)

    between = 0.0
    if len(values) > 1 and excess(0.0) > 0:
        most = ((values - values.mean()) ** 2).sum()  # at which the excess is 1 - (C - 1) at most
        between = scipy.optimize.brentq(excess, 0.0, most, xtol=1e-9 * most)
    return common(between), between


def _inverse_trigamma(value: float) -> float:
    """y > 0 with trigamma(y) = value; infinite for 0."""
    if value <= scipy.special.polygamma(1, 1e6):
        return math.inf
    return scipy.optimize.brentq(
        lambda y: scipy.special.polygamma(1, y) - min(value, scipy.special.polygamma(1, _LEAST)), _LEAST, 1e6 + 1
    )
