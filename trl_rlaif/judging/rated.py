"""Labels of pairs whose responses a judge scores separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_rlaif.judging.question import Answer
from trl_rlaif.types import CriterionLabel, Label

if TYPE_CHECKING:
    from trl_rlaif.judging.distribution import ScoreDistribution


@dataclass(frozen=True)
class Rated:
    """A judge's rating of a response.

    Args:
        score: Distribution of the reward, in [-1, 1].
        mass: Total probability of all candidates under the judge, in [0, 1].
    """

    score: ScoreDistribution
    mass: float

    @property
    def reward(self) -> float:
        """Expected reward."""
        return self.score.mean

    @property
    def spread(self) -> float:
        """Standard deviation of the reward."""
        return self.score.spread

    def above(self, other: Rated) -> float:
        """Probability that the reward exceeds another one's; ties count half."""
        return self.score.above(other.score)


def rated_label(
    id: str,
    judge: str,
    both: Sequence[Any],
    answers: Sequence[Sequence[Answer]],
    criteria: Callable[[Any, Any], list[CriterionLabel]] | None = None,
) -> Label:
    """Make the label of a pair from the ratings of its responses.

    Args:
        id: Id of the pair.
        judge: Name of the judge.
        both: For each response, a Rated or an object with its properties; or the reason why there is none.
        answers: The judge's answers for each response. Their rationales are stored in the fields that comparisons use
            for the two orders.
        criteria: Verdicts by criterion, if the judge was asked about several.
    """
    kept = [[text for answer in of for text in answer.rationales] or None for of in answers]
    written = kept if criteria else [of[0].rationale for of in answers]
    rationales: dict[str, Any] = dict(zip(("rationale_12", "rationale_21"), written, strict=True))
    failed = next((one for one in both if isinstance(one, str)), None)
    if failed is not None:
        return Label(id, judge=judge, skipped=failed, **rationales)
    first, second = both
    bounds = [max(answer.bound for answer in of) or None for of in answers]
    return Label(
        id,
        p=first.above(second),
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
        criteria=criteria(first, second) if criteria else None,
        **rationales,
    )
