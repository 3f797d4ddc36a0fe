"""A sequential test of whether a category's scores have risen since the start of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Nominal bound on the probability of any false alarm in a run, over all categories and updates. It should stay below
# 5% for scores that are not normally distributed, too: benchmarks/drift_alarm.py.
ALPHA = 0.02
# Number of values after which a category's mean and spread are known well enough to test the next value.
FEWEST = 20
# The precision rho of the prior: the test is most sensitive after about ten times as many values.
_MIXTURE = 16
# Residuals are capped at this many standard deviations, so that a heavy upper tail does not count as a rise.
_MOST = 3.0
# Weight of a new value in the recent mean, which thus spans about 30 values.
_RECENT = 1 / 32


@dataclass
class Rise:
    """Anytime-valid evidence that the values of one category have risen.

    Each value after the first ``FEWEST`` is compared with the mean and the standard deviation of all values before it
    (self-starting residuals, Hawkins 1987), which accounts for the uncertainty of the baseline. Without a rise, the
    residuals are martingale differences of variance 1. Their sum S over n values gives the
    likelihood ratio of a rise, averaged over a half-normal prior of its size with precision rho,

        E = 2 sqrt(rho / (n + rho)) exp(S^2 / (2 (n + rho))) Phi(S / sqrt(n + rho)),

    a supermartingale that starts at 1: without a rise, the probability that it ever exceeds 1 / alpha is at most alpha,
    however often it is checked (Robbins 1970; Howard et al. 2021, one-sided normal mixture).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the deviations from the mean (Welford 1962)
    residuals: float = 0.0  # S
    start: float = 0.0
    recent: float = 0.0
    raised: bool = False

    def add(self, value: float) -> None:
        """Update with a value: the mean score of one prompt's responses, since these are not independent."""
        std = self.std
        if self.count >= FEWEST and std > 0:
            free = self.count - 1  # degrees of freedom of Student's t, which is scaled to variance 1
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
        """Sample standard deviation of all values; 0 before the second."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def size(self) -> float:
        """Recent mean minus mean of the first values, in standard deviations; 0 until known."""
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
        """Whether the rise is significant if ``tests`` categories are monitored (Bonferroni)."""
        return self.log_evidence >= math.log(tests / ALPHA)
