"""Exact distributions of weighted sums of a judge's answers, which are assumed to be independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_rlaif.judging.weights import SCALE


@dataclass(frozen=True)
class ScoreDistribution:
    """The distribution of a response's score.

    Args:
        scores: (K,) float64, all possible scores, ascending.
        probabilities: (K,) float64, their probabilities, which sum to 1.
    """

    scores: np.ndarray
    probabilities: np.ndarray

    @property
    def mean(self) -> float:
        """The expected score."""
        mean = math.fsum(self.scores * self.probabilities)
        return float(min(max(mean, self.scores[0]), self.scores[-1]))  # rounding may exceed them

    @property
    def spread(self) -> float:
        """Standard deviation of the score."""
        return math.sqrt(math.fsum((self.scores - self.mean) ** 2 * self.probabilities))

    def between(self, low: float, high: float) -> ScoreDistribution:
        """Scores mapped linearly: the lowest one to ``low``, the highest one to ``high``."""
        share = (self.scores - self.scores[0]) / (self.scores[-1] - self.scores[0])
        return ScoreDistribution(low + (high - low) * share, self.probabilities)

    def at_least(self, least: float) -> ScoreDistribution:
        """Scores below ``least``, which is one of the scores, raised to it."""
        kept = int(np.searchsorted(self.scores, least))
        raised = np.concatenate([[self.probabilities[: kept + 1].sum()], self.probabilities[kept + 1 :]])
        return ScoreDistribution(self.scores[kept:], raised)

    def failing(self, p: float) -> ScoreDistribution:
        """The lowest score with probability ``p``, otherwise unchanged."""
        lowest = np.zeros_like(self.probabilities)
        lowest[0] = p  # independently of the score
        return ScoreDistribution(self.scores, (1 - p) * self.probabilities + lowest)

    def above(self, other: ScoreDistribution) -> float:
        """Probability in [0, 1] that this score exceeds another one of the same ``scores``; ties count half."""
        below = np.cumsum(other.probabilities) - other.probabilities / 2
        return min(1.0, math.fsum(self.probabilities * below))


def weighted_sum(weights: Sequence[float], answers: Sequence[Sequence[float]]) -> ScoreDistribution:
    """Distribution of the weighted sum of answers, each of which is an integer from 0.

    Args:
        weights: One for each answer, as ``check_weight`` accepts them.
        answers: For each answer, the probabilities of 0, 1, 2, ..., which sum to 1.

    Returns:
        Over all multiples of the weights' greatest common divisor between the least and the largest sum.
    """
    whole = [round(weight * SCALE) for weight in weights]
    unit = math.gcd(*whole)
    steps = [weight // unit for weight in whole]
    sums, least = np.ones(1), 0
    for step, p in zip(steps, answers, strict=True):
        reach = (len(p) - 1) * step
        longer = np.zeros(len(sums) + abs(reach))
        for value, probability in enumerate(p):
            start = value * step - min(reach, 0)
            longer[start : start + len(sums)] += probability * sums
        sums, least = longer, least + min(reach, 0)
    return ScoreDistribution((least + np.arange(len(sums))) * unit / SCALE, sums)
