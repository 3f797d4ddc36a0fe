"""A sequential test of whether a category's scores have risen since the run began."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Probability, at most, that a run whose scores do not rise raises an alarm in any category at any update. It is to stay
# below 5% for scores that are not normally distributed, too: benchmarks/drift_alarm.py.
ALPHA = 0.02
# Values from which a category's mean and spread are known well enough to judge the next one by them.
FEWEST = 20
# Values after which the test is the most sensitive, about ten times this number.
_MIXTURE = 16
# One value counts for at most so many standard deviations upwards, so that a heavy tail is no rise.
_MOST = 3.0
# Of one value in the recent mean, which thus remembers about 30 values.
_RECENT = 1 / 32


@dataclass
class Rise:
    """Evidence that the values of one category are higher than those before them, valid at every moment.

    Each value beyond the first ``FEWEST`` is compared with the mean and the standard deviation of all values before it
    (self-starting residuals, Hawkins 1987), so that what is not yet known of the start is part of the comparison.
    Without a rise the residuals are martingale differences of variance 1. Their sum S over n values gives the
    likelihood ratio of a rise, averaged over a half-normal prior of its size with precision rho,

        E = 2 sqrt(rho / (n + rho)) exp(S^2 / (2 (n + rho))) Phi(S / sqrt(n + rho)),

    a supermartingale that begins at 1: without a rise it ever exceeds 1 / alpha with a probability of alpha at most,
    however often one looks (Robbins 1970; Howard et al. 2021, one-sided normal mixture).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the deviations from the mean (Welford 1962)
    residuals: float = 0.0  # S
    start: float = 0.0
    recent: float = 0.0
    raised: bool = False

    def add(self, value: float) -> None:
        """Take in a value: the mean score of one prompt's responses, for these are not independent."""
        std = self.std
        if self.count >= FEWEST and std > 0:
            free = self.count - 1  # of Student's t, which is scaled to variance 1
            residual = (value - self.mean) / std * math.sqrt(self.count / (self.count + 1) * (free - 2) / free)
            self.residuals += min(residual, _MOST)
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self.squares += before * (value - self.mean)
        if self.count <= FEWEST:
            self.start = self.recent = self.mean
        else:
            self.recent += _RECENT * (value - self.recent)

    @property
    def std(self) -> float:
        """Standard deviation of all values, in their unit."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def size(self) -> float:
        """How far the recent mean is above that of the first values, in standard deviations; 0 until it is known."""
        return (self.recent - self.start) / self.std if self.std > 0 else 0.0

    @property
    def log_evidence(self) -> float:
        """log E."""
        tested = max(0, self.count - FEWEST) + _MIXTURE
        z = self.residuals / math.sqrt(tested)
        if z < -30:  # where Phi underflows
            return -math.inf
        return math.log(math.erfc(-z / math.sqrt(2))) + 0.5 * (math.log(_MIXTURE / tested) + z * z)

    def significant(self, tests: int) -> bool:
        """Whether it has risen for sure, where ``tests`` categories are watched (Bonferroni)."""
        return self.log_evidence >= math.log(tests / ALPHA)
