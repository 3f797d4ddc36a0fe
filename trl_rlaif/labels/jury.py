"""Combines the votes of several judges, with each one's reliability learned without ground truth.

A vote is a probability that response_1 is preferred. The result does not depend on the responses' order: if the
responses of a pair are swapped in every vote, its combined probability becomes 1 - p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import expit, logit

# Votes are clipped to odds of 999 to 1: sampled answers, for example, are often unanimous.
SUREST = 0.999
# Initial reliability of every member, so that the optimum found is the one in which most votes are right, not its
# mirror image.
_START = 0.75
# One pseudo-count each of a right and a wrong vote per member: nobody is certainly right or wrong.
_IMAGINED = 1.0
_TOLERANCE, _MAX_ROUNDS = 1e-10, 10_000


class Join(Protocol):
    """A fitted method of combining votes.

    Attributes:
        reliability: (J,) float64, the learned reliability of each member.
        chance: The reliability of a member whose votes carry no information.
    """

    reliability: np.ndarray
    chance: float

    def join(self, votes: np.ndarray) -> np.ndarray:
        """The combined probabilities, (N,) float64 in [0, 1], of (N, J) votes; NaN is a missing vote.

        A pair without any vote gets 0.5.
        """
        ...


@dataclass(frozen=True)
class LogOddsPool:
    """A weighted mean of log-odds: a logarithmic opinion pool (Genest and Zidek 1986) whose weights are learned.

    Log-odds are divided by each member's root mean square, so that no member outvotes the others merely by always being
    sure. A member's weight is its agreement with the others: the correlation of its log-odds with their mean, like the
    item-rest correlation of a test item; one that agrees no more than by chance has weight 0. If all agree, the result
    is as confident as the median member.

    Satopää et al. (2014) extremize such a pool by a factor, since its members have different information. The factor
    cannot be learned without ground truth: ``trl_rlaif.labels.calibration`` fits it to human labels.

    Args:
        reliability: (J,), the agreement of each member with the others, in [-1, 1].
        scales: (J,), the root mean square of each member's log-odds, in nats.
    """

    reliability: np.ndarray
    scales: np.ndarray
    chance = 0.0

    @classmethod
    def fit(cls, votes: np.ndarray) -> LogOddsPool:
        """From (N, J) probabilities in [0, 1]; NaN is a missing vote."""
        logits, known = _logits(votes), ~np.isnan(votes)
        scales = np.sqrt((logits**2).sum(axis=0) / np.maximum(known.sum(axis=0), 1))
        z = logits / np.where(scales > 0, scales, 1.0)
        others = known.sum(axis=1, keepdims=True) - known
        rest = (z.sum(axis=1, keepdims=True) - z) / np.maximum(others, 1)
        both = known & (others > 0)
        rest, z = np.where(both, rest, 0.0), np.where(both, z, 0.0)
        norms = np.sqrt((z**2).sum(axis=0) * (rest**2).sum(axis=0))
        return cls((z * rest).sum(axis=0) / np.where(norms > 0, norms, 1.0), scales)

    def join(self, votes: np.ndarray) -> np.ndarray:
        """As in ``Join``; 0.5 if only members of weight 0 have voted."""
        weights = np.maximum(self.reliability, 0.0) * ~np.isnan(votes)
        z = _logits(votes) / np.where(self.scales > 0, self.scales, 1.0)
        total = weights.sum(axis=1)
        return expit(np.median(self.scales) * (weights * z).sum(axis=1) / np.where(total > 0, total, 1.0))


@dataclass(frozen=True)
class DawidSkene:
    """The model of Dawid and Skene (1979) for soft votes: members err independently, each at its own rate.

    Which response is better is latent. Each member picks the better one with a probability, its reliability, and p is
    its certainty about its own pick: the vote is as latent as the answer. So the likelihood of p is
    a * p + (1 - a) * (1 - p), a the reliability. With votes of 0 and 1 this is their model for two equally likely
    classes, and with one error rate per member for both, since which response is response_1 is random.

    Members with correlated errors, such as several prompts of one judge, are treated as independent: the result is then
    far too confident.

    Args:
        reliability: (J,), the probability that each member picks the better response, in (0, 1).
    """

    reliability: np.ndarray
    chance = 0.5

    @classmethod
    def fit(cls, votes: np.ndarray) -> DawidSkene:
        """Maximum a posteriori by EM, from (N, J) probabilities in [0, 1]; NaN is a missing vote.

        The prior is Beta(2, 2): one right and one wrong vote.
        """
        known = ~np.isnan(votes)
        p, counts = np.where(known, votes, 0.5), known.sum(axis=0)
        found = np.full(votes.shape[1], _START)
        for _ in range(_MAX_ROUNDS):
            before = found
            heard = _heard(p, before)
            first = expit(_evidence(votes, before))[:, None]
            right = before * (first * p / heard + (1 - first) * (1 - p) / (1 - heard))
            found = ((right * known).sum(axis=0) + _IMAGINED) / (counts + 2 * _IMAGINED)
            if np.abs(found - before).max() < _TOLERANCE:
                break
        return cls(found)

    def join(self, votes: np.ndarray) -> np.ndarray:
        """As in ``Join``: the posterior probability that response_1 is the better one."""
        return expit(_evidence(votes, self.reliability))


JOINS: dict[str, Any] = {"log_odds": LogOddsPool, "dawid_skene": DawidSkene}


def disagreement(votes: np.ndarray) -> np.ndarray:
    """Standard deviation of each pair's votes, (N,) in [0, 0.5]; NaN where fewer than two members voted.

    Args:
        votes: (N, J) probabilities; NaN is a missing vote.
    """
    known = ~np.isnan(votes)
    several = known.sum(axis=1) > 1
    found = np.full(len(votes), np.nan)
    found[several] = np.nanstd(votes[several], axis=1)
    return found


def _logits(votes: np.ndarray) -> np.ndarray:
    """Log-odds; 0 for a missing vote."""
    return np.nan_to_num(logit(np.clip(votes, 1 - SUREST, SUREST)))


def _heard(p: np.ndarray, reliability: np.ndarray) -> np.ndarray:
    """The likelihood of a vote if response_1 is better, given the member's reliability."""
    return reliability * p + (1 - reliability) * (1 - p)


def _evidence(votes: np.ndarray, reliability: np.ndarray) -> np.ndarray:
    """(N,) log-odds that response_1 is better, from all votes."""
    return np.nan_to_num(logit(_heard(votes, reliability))).sum(axis=1)
