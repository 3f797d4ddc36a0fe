"""Mean and standard deviation of each category's scores; categories with few scores borrow from the others."""

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
# Degrees of freedom from which a spread is known well enough (to about 20%).
ENOUGH = 16
# Relative rounding error of a mean square: a multiple of float64's, below the resolution of float32 scores.
_ROUNDING = 1e-14
# Half the minimum degrees of freedom of the prior of the variances: negligibly few.
_LEAST = 0.01


@dataclass
class Moments:
    """Exponentially weighted mean and variance with bias correction.

    A batch is added at once: if a new score has weight ``share`` = s, n of them replace 1 - (1 - s)^n of the past.
    The sum of weights is tracked with the weighted sums, which is Adam's bias correction (Kingma and Ba 2015).
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, values: list[float], share: float) -> None:
        """Update with a batch of scores, at least one."""
        keep = (1 - share) ** len(values)
        new = 1 - keep  # the same number in all three, so that its rounding error cancels
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
        """Mean squared deviation from the mean; 0 if it is within the rounding error of equal scores."""
        variance = self.second - self.mean**2
        return variance if variance > _ROUNDING * self.second else 0.0


class RunningScores:
    """Mean and standard deviation of the scores of each category.

    Args:
        share: Weight of a new score in the running statistics, 0 < share < 1.
        prior: Maximum weight, in scores, of the other categories' statistics; it decreases the more the categories
            differ. 0 treats every category separately.
    """

    def __init__(self, share: float, prior: float) -> None:
        self.share, self.prior = share, prior
        self.moments: dict[str, Moments] = {}
        self.unnamed = Moments()  # of the scores without a category

    def add(self, scores: Iterable[tuple[str | None, float]]) -> None:
        """Update with a batch of scores with their categories."""
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
        """Mean and standard deviation of all scores, regardless of category; (0, 1) before the first."""
        return self.own(POOLED) if self.moments else (0.0, 1.0)

    def within(self) -> tuple[float, bool]:
        """Standard deviation of the scores about their own category's mean, 0 before the first.

        Returns:
            The standard deviation, and whether it rests on enough scores; until then, it is that of all scores.
        """
        own = list(self._kinds().values())
        free = sum(self._size(m) - 1 for m in own)
        if free < ENOUGH:
            return (self.pooled()[1] if own else 0.0), False
        return math.sqrt(sum(self._size(m) * m.variance for m in own) / free), True

    def figures(self, category: str | None) -> tuple[float, float]:
        """A category's mean and standard deviation from ``table``; pooled ones for an unseen category."""
        return self.table().get(category or UNNAMED, self.pooled())

    def table(self) -> dict[str | None, tuple[float, float]]:
        """Mean and standard deviation by category; None for the scores without one.

        Empirical Bayes, with the spread between categories kept apart from the spread within them: means are shrunk
        towards a common mean as far as they may differ by chance (one-way random effects), and variances likewise, on
        the log scale (Smyth 2004, section 6.2).
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
        """(C,) posterior variances under a scaled inverse chi-square prior estimated from the categories."""
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
        # Without a prior, the spread of a single score is unknown: the common one is used.
        return np.where(weight + free > 0, (weight * place + squares) / np.maximum(weight + free, 1e-9), place)

    def _kinds(self) -> dict[str | None, Moments]:
        named: dict[str | None, Moments] = {name: moments for name, moments in self.moments.items() if name != POOLED}
        return named | {UNNAMED: self.unnamed} if self.unnamed.count else named

    def _size(self, moments: Moments) -> float:
        """Effective number of scores; it does not decay while a category is absent."""
        return min(moments.count, 1 / self.share)

    def state_dict(self) -> dict[str, Any]:
        """The moments of every category."""
        found: dict[Any, Any] = {name: (m.weight, m.total, m.squares, m.count) for name, m in self.moments.items()}
        u = self.unnamed
        return found | {UNNAMED: (u.weight, u.total, u.squares, u.count)} if u.count else found

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.moments = {name: Moments(*values) for name, values in state.items() if name != UNNAMED}
        self.unnamed = Moments(*state.get(UNNAMED, ()))


def _random_effects(values: np.ndarray, variances: np.ndarray) -> tuple[float, float]:
    """Common mean of (C,) values with known error variances, and the variance of the true values about it.

    That variance makes the weighted sum of squares equal to C - 1, or it is 0 (Paule and Mandel 1982); 0 for a single
    value.
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
