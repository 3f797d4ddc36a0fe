"""From the candidates' log-probabilities in both orders to one probability."""

from __future__ import annotations

import math
from typing import Literal

Debias = Literal["mean_prob", "mean_logit"]


def preference(logprob_1: float, logprob_2: float) -> tuple[float, float]:
    """Probability of the first candidate among the two, and the mass of both.

    Args:
        logprob_1, logprob_2: The judge's log-probabilities of "1" and "2", in nats.

    Returns:
        (p, mass): softmax over the two, in [0, 1]; and P("1") + P("2"), in [0, 1].
    """
    mass = math.exp(logprob_1) + math.exp(logprob_2)
    return sigmoid(logprob_1 - logprob_2), min(mass, 1.0)  # rounding may exceed 1


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def combine(logit_12: float, logit_21: float, mode: Debias) -> float:
    """One probability that response_1 is preferred, from both orders.

    Args:
        logit_12: Log-odds of response_1 when it is shown first.
        logit_21: Log-odds of response_1 when it is shown second (already mapped back).
        mode: ``mean_prob`` averages the probabilities (Lee et al. 2023, section 2.1); ``mean_logit``
            averages the log-odds, which cancels an additive bias exactly and keeps the confidence.

    Returns:
        p in [0, 1].
    """
    if mode == "mean_prob":
        return (sigmoid(logit_12) + sigmoid(logit_21)) / 2
    return sigmoid((logit_12 + logit_21) / 2)
