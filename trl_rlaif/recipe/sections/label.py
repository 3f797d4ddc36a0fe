"""The section ``label``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from trl_rlaif.recipe.sections.judges import JUDGES, Judge, OtherJudgeSection, ServerJudgeSection
from trl_rlaif.recipe.sections.values import (
    Component,
    ComponentRef,
    DataPath,
    Number,
    PromptFolder,
    SafeName,
    Section,
    Text,
    exact_weight,
    name_besides,
)


class CriterionSection(Section):
    """One of several criteria that pairs are labeled by."""

    description: Text | None = Field(None, description="What the judge is told of it; null: its name.")
    weight: Annotated[Number, AfterValidator(exact_weight)] = Field(
        1.0, gt=0, description="What it counts beside the others, with up to two decimals."
    )
    veto: bool = Field(False, description="Whether it must hold, asked as yes or no of each response.")


class ComparedSection(OtherJudgeSection):
    """One of ``label.compare``."""

    labeler: Component | None = Field(None, description="The labeler, with its options.")


class RankingSection(Section):
    """``label.ranking``: each prompt's responses in order, by a Bradley-Terry model of what the judge answers."""

    method: Literal["tournament", "all_pairs"] = Field(
        description="tournament: ask what is most uncertain after the answers so far; all_pairs: ask about every pair."
    )
    questions: int | None = Field(
        None,
        ge=1,
        description="A tournament's questions about a prompt, each about a pair in one order; null: a third of all.",
    )
    at_once: int = Field(
        1, ge=1, description="Questions about a prompt in a tournament's round; more make fewer rounds that know less."
    )
    confidence: Number = Field(
        0.95,
        ge=0.5,
        le=1,
        description="A tournament is done with a prompt once each of its pairs is in order with this probability.",
    )


class JurySection(Section):
    """``label.jury``: the main labeler and those of ``label.compare`` label together."""

    join: Literal["log_odds", "dawid_skene"] = Field(
        "log_odds",
        description="log_odds: mean of the members' log-odds, weighted by their agreement with the others; "
        "dawid_skene: posterior of members who err independently, each at a rate of its own.",
    )
    max_disagreement: Number | None = Field(
        None,
        ge=0,
        le=0.5,
        description="Pairs whose votes have a greater standard deviation, or fewer than two votes, are left out.",
    )


class BudgetSection(Section):
    """How much labeling may use of judges on servers."""

    tokens: int | None = Field(None, ge=1, description="Tokens read and written; null is as many as it takes.")
    cost: Number | None = Field(None, gt=0, description="Money, in the currency of judge.price; null is no limit.")

    @model_validator(mode="after")
    def _limited(self) -> BudgetSection:
        if self.tokens is None and self.cost is None:
            raise ValueError("Give tokens or cost.")
        return self


class LabelSection(Section):
    """``label``: preferences from a judge."""

    labeler: Component = Field(ComponentRef("distilled"), description="The labeler, with its options.")
    judge: Judge = Field("same", description=JUDGES)
    prompt: PromptFolder = Field("general", description="A packaged prompt's name, or a prompt folder.")
    criteria: dict[SafeName, Annotated[Number, Field(gt=0), AfterValidator(exact_weight)] | CriterionSection] = Field(
        default_factory=dict,
        description="Criteria in place of one question, each asked by itself: a weight, or {description: ..., "
        "weight: 1, veto: false}; for labelers with the option criteria.",
    )
    batch_tokens: int = Field(2048, ge=1, description="Tokens that the judge computes at once.")
    precision: Literal["auto", "highest", "high", "medium"] = Field(
        "auto", description="Of float32 matrix products; auto takes the fastest that leaves labels within 1e-4."
    )
    min_confidence: Number = Field(0.5, ge=0.5, le=1, description="Pairs whose label is less sure are left out.")
    calibration: DataPath | None = Field(
        None,
        description="Pairs that people judged (20 or more): labels are calibrated on them, if cross-validation shows "
        "that it helps.",
    )
    ranking: RankingSection | None = Field(
        None, description="Rank each prompt's responses; its pairs get the probabilities that follow from the ranking."
    )
    compare: dict[Annotated[str, name_besides("label", "the main labeler's")], ComparedSection] = Field(
        default_factory=dict, description="More labelers by name: the report compares them with the main one."
    )
    jury: JurySection | None = Field(
        None, description="The main labeler and those of compare label together; without it the main one labels alone."
    )

    budget: BudgetSection | None = Field(
        None, description="Tokens or money for judges on servers: labeling stops where it is used up, to be resumed."
    )

    @property
    def judges(self) -> list[Judge]:
        """The main judge and those of compare."""
        return [self.judge, *(other.judge for other in self.compare.values() if other.judge is not None)]

    @model_validator(mode="after")
    def _affordable(self) -> LabelSection:
        servers = [judge for judge in self.judges if isinstance(judge, ServerJudgeSection)]
        if self.budget and not servers:
            raise ValueError("Only judges on servers use a budget: leave it out, or set backend: openai.")
        unpriced = [judge.path for judge in servers if judge.price is None]
        if self.budget and self.budget.cost is not None and unpriced:
            raise ValueError(f"A budget of money needs the price of every judge: add it to {', '.join(unpriced)}.")
        return self

    @model_validator(mode="after")
    def _judged(self) -> LabelSection:
        if self.criteria and all(isinstance(of, CriterionSection) and of.veto for of in self.criteria.values()):
            raise ValueError("Every one of the criteria is a veto. Give at least one that responses are judged by.")
        return self

    @property
    def main_labeler(self) -> ComponentRef:
        """The labeler with the criteria among its options."""
        if not self.criteria:
            return self.labeler
        criteria = {
            name: of.model_dump()
            if isinstance(of, CriterionSection)
            else CriterionSection.model_validate({"weight": of}).model_dump()
            for name, of in self.criteria.items()
        }
        return replace(self.labeler, options={**self.labeler.options, "criteria": criteria})
