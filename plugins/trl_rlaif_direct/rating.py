"""Converts a judge's distribution over 1..10 to a reward and its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RATINGS = tuple(str(i) for i in range(1, 11))


@dataclass(frozen=True)
class Rating:
    """A response's rating.

    Args:
        probabilities: Probabilities of 1, 2, ..., 10, which sum to 1.
        mass: Total probability of all ten, in [0, 1].
    """

    probabilities: tuple[float, ...]
    mass: float

    @property
    def reward(self) -> float:
        """2 (s - 1) / 9 - 1 with s the expected rating: in [-1, 1] (Lee et al. 2023, section 2.2.2)."""
        return math.fsum(p * value for p, value in zip(self.probabilities, _VALUES, strict=True))

    @property
    def spread(self) -> float:
        """Standard deviation of the reward under the distribution: in [0, 1]."""
        mean = self.reward
        squares = (p * (value - mean) ** 2 for p, value in zip(self.probabilities, _VALUES, strict=True))
        return math.sqrt(math.fsum(squares))

    def above(self, other: Rating) -> float:
        """Probability that this rating is higher, both drawn from their distributions; ties count half."""
        below = 0.0
        p = 0.0
        for a, b in zip(self.probabilities, other.probabilities, strict=True):
            p += a * (below + b / 2)
            below += b
        return min(1.0, p)


_VALUES = tuple(2 * i / 9 - 1 for i in range(10))


def rating(draws: Sequence[Sequence[float]]) -> Rating:
    """The mean of distributions, one for each rationale (a single one without).

    Args:
        draws: Log-probabilities of the ten candidates in nats; -inf for a candidate that never occurred.
    """
    normalized, masses = [], []
    for logprobs in draws:
        high = max(logprobs)
        weights = [math.exp(x - high) for x in logprobs]
        total = math.fsum(weights)
        normalized.append([w / total for w in weights])
        masses.append(min(1.0, math.exp(high) * total))
    means = tuple(math.fsum(column) / len(draws) for column in zip(*normalized, strict=True))
    return Rating(means, math.fsum(masses) / len(draws))
