"""Responses rated by several criteria: weighted means of the ratings, and what must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trl_rlaif import YES_NO, Answer, CriteriaOptions, CriterionLabel, Label, ScoreDistribution, weighted_sum, yes
from trl_rlaif_direct.rating import RATINGS, Rating, rating

# By candidates, what a judge says of one response.
Answers = Mapping[tuple[str, ...], Sequence[Answer]]


@dataclass(frozen=True)
class CriteriaRating:
    """A response's ratings by several criteria.

    Args:
        ratings: By each criterion that has a weight.
        holds: The probability that each veto holds.
        score: The distribution of the weighted mean of the ratings as rewards, in [-1, 1]; -1 where a veto fails.
    """

    ratings: list[Rating]
    holds: list[float]
    score: ScoreDistribution

    @property
    def reward(self) -> float:
        """Its expectation."""
        return self.score.mean

    @property
    def spread(self) -> float:
        """Its standard deviation."""
        return self.score.spread

    @property
    def mass(self) -> float:
        """What the judge gave to all ten ratings together, on average over the criteria."""
        return fmean(one.mass for one in self.ratings)


def rate_by_criteria(options: CriteriaOptions, answers: Answers) -> CriteriaRating | str:
    """A response's rating, or why there is none.

    Args:
        options: With the criteria.
        answers: The judge's ratings by each criterion that has a weight, and its answers "Yes" or "No" to each veto;
            independent of each other.
    """
    rated, holds = answers[RATINGS], yes(answers.get(YES_NO, []))
    failed = next((answer.failed for answer in rated if answer.failed), None)
    if failed or isinstance(holds, str):
        return failed or str(holds)
    ratings = [rating(answer.logprobs) for answer in rated]
    weights = [of.weight for of in options.weighed.values()]
    score = weighted_sum(weights, [one.probabilities for one in ratings]).between(-1.0, 1.0)
    return CriteriaRating(ratings, holds, score.failing(1 - math.prod(holds)))


def label_by_criteria(id: str, options: CriteriaOptions, both: Sequence[Answers], judge: str) -> Label:
    """A pair's label; p is the probability that response_1 scores higher, ties counted half.

    Args:
        id: The pair's.
        options: With the criteria.
        both: What the judge says of each response, as ``rate_by_criteria`` takes it.
        judge: The judge's name.
    """
    answers = [[answer for of in one.values() for answer in of] for one in both]
    written = [[text for answer in of for text in answer.rationales] or None for of in answers]
    rationales: dict[str, Any] = dict(zip(("rationale_12", "rationale_21"), written, strict=True))
    first, second = (rate_by_criteria(options, one) for one in both)
    if isinstance(first, str) or isinstance(second, str):
        return Label(id, judge=judge, skipped=first if isinstance(first, str) else str(second), **rationales)
    bounds = [max(answer.bound for answer in of) or None for of in answers]
    return Label(
        id,
        p=first.score.above(second.score),
        mass_12=first.mass,
        mass_21=second.mass,
        judge=judge,
        score_1=first.reward,
        score_2=second.reward,
        spread_1=first.spread,
        spread_2=second.spread,
        bound_12=bounds[0],
        bound_21=bounds[1],
        voted=any(answer.voted for of in answers for answer in of) or None,
        criteria=by_criterion(options, first, second),
        **rationales,
    )


def by_criterion(options: CriteriaOptions, first: CriteriaRating, second: CriteriaRating) -> list[CriterionLabel]:
    """What a label keeps of both responses' ratings."""
    rated = zip(options.weighed.items(), first.ratings, second.ratings, strict=True)
    found = [CriterionLabel(name, of.weight, score_1=one.reward, score_2=two.reward) for (name, of), one, two in rated]
    held = zip(options.vetoes, first.holds, second.holds, strict=True)
    return found + [CriterionLabel(name, 0.0, score_1=one, score_2=two, veto=True) for name, one, two in held]
