"""Responses rated by several criteria: weighted means of the ratings, and vetoes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from trl_rlaif import (
    YES_NO,
    Answer,
    CriteriaOptions,
    CriterionLabel,
    Label,
    Rated,
    rated_label,
    weighted_sum,
    yes,
)
from trl_rlaif_direct.rating import RATINGS, Rating, rating

# A judge's answers about one response, by candidates.
Answers = Mapping[tuple[str, ...], Sequence[Answer]]


@dataclass(frozen=True)
class CriteriaRating(Rated):
    """A response's ratings by several criteria.

    Args:
        score: Distribution of the weighted mean of the ratings as rewards, in [-1, 1]; -1 if a veto fails.
        mass: Total probability of all ten ratings, averaged over the criteria.
        ratings: Ratings by criterion, of those with a weight.
        holds: Probability that each veto's statement holds.
    """

    ratings: list[Rating]
    holds: list[float]


def rate_by_criteria(options: CriteriaOptions, answers: Answers) -> CriteriaRating | str:
    """A response's rating, or the reason why there is none.

    Args:
        options: Contain the criteria.
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
    mass = fmean(one.mass for one in ratings)
    return CriteriaRating(score.failing(1 - math.prod(holds)), mass, ratings, holds)


def label_by_criteria(id: str, options: CriteriaOptions, both: Sequence[Answers], judge: str) -> Label:
    """A pair's label, from the judge's answers about each response, in the format of ``rate_by_criteria``."""
    rated = [rate_by_criteria(options, one) for one in both]
    answers = [[answer for of in one.values() for answer in of] for one in both]
    return rated_label(id, judge, rated, answers, partial(by_criterion, options))


def by_criterion(options: CriteriaOptions, first: CriteriaRating, second: CriteriaRating) -> list[CriterionLabel]:
    """Both responses' ratings as stored in a label."""
    rated = zip(options.weighed.items(), first.ratings, second.ratings, strict=True)
    found = [CriterionLabel(name, of.weight, score_1=one.reward, score_2=two.reward) for (name, of), one, two in rated]
    held = zip(options.vetoes, first.holds, second.holds, strict=True)
    return found + [CriterionLabel(name, 0.0, score_1=one, score_2=two, veto=True) for name, one, two in held]
