"""Several criteria instead of one question: their options, and how their verdicts combine into one label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import scipy  # its subpackages are imported on first use
from pydantic import Field, field_validator, model_validator

from trl_rlaif.components import Options
from trl_rlaif.errors import UserError
from trl_rlaif.judging.question import Answer, ThinkingOptions
from trl_rlaif.judging.weights import check_weight

YES_NO = ("Yes", "No")


class CriterionOptions(Options):
    """One of several criteria that a response is judged by."""

    description: str | None = Field(None, min_length=1, description="What the judge is told about it; null: its name.")
    weight: float = Field(1.0, gt=0, description="Weight relative to the other criteria, with up to two decimals.")
    veto: bool = Field(
        False, description="Whether a response must meet it: asked as yes or no, without effect on responses that do."
    )

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        try:
            check_weight(weight, "a criterion")
        except UserError as error:
            raise ValueError(str(error)) from None
        return weight


class CriteriaOptions(ThinkingOptions):
    """Options of labelers that can ask by several criteria."""

    criteria: dict[str, CriterionOptions] = Field(
        default_factory=dict,
        description="Criteria by name, each asked separately: a weight, or {description: ..., weight: 1, veto: false}.",
    )

    @field_validator("criteria", mode="before")
    @classmethod
    def _weights(cls, criteria: Any) -> Any:
        """A number is a criterion's weight."""
        if not isinstance(criteria, dict):
            return criteria
        return {name: of if isinstance(of, dict | Options) else {"weight": of} for name, of in criteria.items()}

    @model_validator(mode="after")
    def _some(self) -> CriteriaOptions:
        if self.criteria and not self.weighed:
            raise ValueError("Every criterion is a veto. Add at least one that responses are judged by.")
        return self

    @property
    def weighed(self) -> dict[str, CriterionOptions]:
        """The weighted criteria, which are not vetoes."""
        return {name: of for name, of in self.criteria.items() if not of.veto}

    @property
    def vetoes(self) -> dict[str, str]:
        """Descriptions of the vetoes, by name."""
        return {name: of.description or name for name, of in self.criteria.items() if of.veto}


def yes(answers: Sequence[Answer]) -> list[float] | str:
    """Probability of Yes among ``YES_NO``, averaged over an answer's rationales; or the reason why there is none."""
    failed = next((answer.failed for answer in answers if answer.failed), None)
    if failed or any(max(draw) == -math.inf for answer in answers for draw in answer.logprobs):
        return failed or "the judge gives neither Yes nor No any probability"
    return [fmean(float(scipy.special.expit(yes - no)) for yes, no in answer.logprobs) for answer in answers]


def weighted_logit(logits: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean of log-odds: a logarithmic pool of opinions (Genest and Zidek 1986, section 3.2).

    Criteria that are certain of opposite sides contradict each other: 0.
    """
    total = sum(weight * logit for logit, weight in zip(logits, weights, strict=True))  # fsum raises on both infinities
    return 0.0 if math.isnan(total) else total / math.fsum(weights)


def with_veto(p: float, holds_1: float, holds_2: float) -> float:
    """Probability that response_1 is preferred, given a criterion that must be met.

    If only one response meets it, that one is preferred; if both or neither do, the preference is as without it.

    Args:
        p: The probability without it.
        holds_1, holds_2: Probability that each response meets it, independently.
    """
    return holds_1 * (1 - holds_2) + p * (holds_1 * holds_2 + (1 - holds_1) * (1 - holds_2))
