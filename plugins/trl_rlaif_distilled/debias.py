"""Combines the candidates' log-probabilities in both orders into one probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from trl_rlaif import Answer

Debias = Literal["mean_prob", "mean_logit"]
Order = Literal["12", "21"]


class Preference(NamedTuple):
    """Preference for response_1 from one order.

    Args:
        logit: Log-odds of response_1; infinite if only one candidate ever occurred.
        p: The same as a probability.
        mass: P("1") + P("2").
    """

    logit: float
    p: float
    mass: float


def unread(answers: Sequence[Answer]) -> str | None:
    """Why an answer ("1" or "2") yields no preference; None if all yield one."""
    failed = next((answer.failed for answer in answers if answer.failed), None)
    if not failed and any(max(draw) == -math.inf for answer in answers for draw in answer.logprobs):
        return "the judge gives neither candidate any probability"
    return failed


def preference(logprob_1: float, logprob_2: float) -> Preference:
    """Preference for the first of two candidates, and the mass of both.

    Args:
        logprob_1, logprob_2: The judge's log-probabilities of "1" and "2", in nats; one may be -inf.
    """
    mass = math.exp(logprob_1) + math.exp(logprob_2)
    logit = logprob_1 - logprob_2
    return Preference(logit, sigmoid(logit), min(mass, 1.0))  # rounding may exceed 1


def mean_preference(order: Order, draws: Sequence[Sequence[float]]) -> Preference:
    """Preference for response_1 from an order's distributions, one for each rationale, averaged.

    Args:
        order: In order "21", response_1 is shown second: it is the candidate "2".
        draws: Log-probabilities of "1" and "2".
    """
    found = [preference(*(draw if order == "12" else reversed(draw))) for draw in draws]
    if len(found) == 1:
        return found[0]
    p = fmean(one.p for one in found)
    # Not log(p / (1 - p)): for a confident judge, 1 - p rounds to 0.
    rest = fmean(sigmoid(-one.logit) for one in found)
    logit = math.inf if rest == 0 else -math.inf if p == 0 else math.log(p) - math.log(rest)
    return Preference(logit, p, fmean(one.mass for one in found))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def combine(logits: Sequence[float], mode: Debias) -> float:
    """One probability that response_1 is preferred, from each order's log-odds of response_1.

    Args:
        logits: One or two; that of order "21" mapped back to response_1.
        mode: ``mean_prob`` averages the probabilities (Lee et al. 2023, section 2.1); ``mean_logit``
            averages the log-odds, which cancels an additive bias exactly and keeps the confidence.

    Returns:
        p in [0, 1].
    """
    if mode == "mean_prob":
        return fmean(map(sigmoid, logits))
    total = sum(logits)  # fsum raises on infinities of both signs
    # Certain of opposite answers, as estimates from votes can be: the orders contradict each other.
    return 0.5 if math.isnan(total) else sigmoid(total / len(logits))
