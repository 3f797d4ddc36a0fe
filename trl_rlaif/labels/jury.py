"""Joins the votes of several judges by a reliability of each that is learned without a single known answer.

A vote is a probability that response_1 is preferred. Nothing here depends on which response is called the first: with
the responses of a pair exchanged in every vote, its joined probability becomes 1 - p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import expit, logit

# Votes count as no surer than 999 to 1: sampled answers, say, are often all the same.
SUREST = 0.999
# Every member begins with this much trust, so that the optimum found is the one in which most votes are right and not
# its mirror image, in which most are wrong.
_START = 0.75
# One imagined right vote and one wrong one for each member: nobody is surely right, or surely wrong.
_IMAGINED = 1.0
_TOLERANCE, _MAX_ROUNDS = 1e-10, 10_000


class Join(Protocol):
    """A fitted way to join votes.

    Attributes:
        reliability: (J,) float64, what was learned of each member.
        chance: The reliability of a member whose votes say nothing.
    """

    reliability: np.ndarray
    chance: float

    def join(self, votes: np.ndarray) -> np.ndarray:
        """The joined probabilities, (N,) float64 in [0, 1], of (N, J) votes; NaN is a vote that is missing.

        A pair without any vote gets 0.5.
        """
        ...


@dataclass(frozen=True)
class LogOddsPool:
    """A weighted mean of log-odds: a logarithmic opinion pool (Genest and Zidek 1986) whose weights are learned.

    Log-odds are divided by each member's own root mean square, so that a member that is always sure does not outvote
    the others by that alone. A member's weight is its agreement with the others, the correlation of its log-odds with
    their mean, as the item-rest correlation weighs the items of a test; one that agrees with them no more than by
    chance has the weight 0. The result is as confident as the median member where all agree.

    Satopää et al. (2014) move such a pool away from 0.5 by a factor, since its members know different things. How far
    cannot be learned without known answers: ``trl_rlaif.labels.calibration`` fits the same factor to people's.

    Args:
        reliability: (J,), the agreement of each member with the others, in [-1, 1].
        scales: (J,), the root mean square of each member's log-odds, in nats.
    """

    reliability: np.ndarray
    scales: np.ndarray
    chance = 0.0

    @classmethod
    def fit(cls, votes: np.ndarray) -> LogOddsPool:
        """Of (N, J) probabilities in [0, 1]; NaN is a vote that is missing."""
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
        """As of ``Join``. Where only members of weight 0 have voted, 0.5."""
        weights = np.maximum(self.reliability, 0.0) * ~np.isnan(votes)
        z = _logits(votes) / np.where(self.scales > 0, self.scales, 1.0)
        total = weights.sum(axis=1)
        return expit(np.median(self.scales) * (weights * z).sum(axis=1) / np.where(total > 0, total, 1.0))


@dataclass(frozen=True)
class DawidSkene:
    """The model of Dawid and Skene (1979) for soft votes: members err independently, each at a rate of its own.

    Which response is better is not known. Each member decides for the better one with a probability, its reliability,
    and p is how sure it is of its own decision: the vote itself is as hidden as the answer. So p counts as
    a * p + (1 - a) * (1 - p), a the reliability. With votes of 0 and 1 this is their model for two classes, each of
    them as likely as the other, and with one error rate a member for both, since it is chance which response is called
    response_1.

    Members that make the same errors, such as several prompts of one judge, are taken for independent: the result is
    then far too sure.

    Args:
        reliability: (J,), the probability that each member decides for the better response, in (0, 1).
    """

    reliability: np.ndarray
    chance = 0.5

    @classmethod
    def fit(cls, votes: np.ndarray) -> DawidSkene:
        """Maximum a posteriori by EM, of (N, J) probabilities in [0, 1]; NaN is a vote that is missing.

        The prior is Beta(2, 2): one vote that was right and one that was wrong.
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
        """As of ``Join``: the posterior probability that response_1 is the better one."""
        return expit(_evidence(votes, self.reliability))


JOINS: dict[str, Any] = {"log_odds": LogOddsPool, "dawid_skene": DawidSkene}


def disagreement(votes: np.ndarray) -> np.ndarray:
    """Standard deviation of each pair's votes, (N,) in [0, 0.5]; NaN where fewer than two members voted.

    Args:
        votes: (N, J) probabilities; NaN is a vote that is missing.
    """
    known = ~np.isnan(votes)
    several = known.sum(axis=1) > 1
    found = np.full(len(votes), np.nan)
    found[several] = np.nanstd(votes[several], axis=1)
    return found


def _logits(votes: np.ndarray) -> np.ndarray:
    """Log-odds, 0 where a vote is missing."""
    return np.nan_to_num(logit(np.clip(votes, 1 - SUREST, SUREST)))


def _heard(p: np.ndarray, reliability: np.ndarray) -> np.ndarray:
    """How likely a vote's decision makes response_1, given how often the member is right."""
    return reliability * p + (1 - reliability) * (1 - p)


def _evidence(votes: np.ndarray, reliability: np.ndarray) -> np.ndarray:
    """(N,) log-odds that response_1 is better, of all votes together."""
    return np.nan_to_num(logit(_heard(votes, reliability))).sum(axis=1)
