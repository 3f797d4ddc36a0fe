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

    description: Text | None = Field(None, description="What the judge is told about it; null: its name.")
    weight: Annotated[Number, AfterValidator(exact_weight)] = Field(
        1.0, gt=0, description="Weight relative to the other criteria, with up to two decimals."
    )
    veto: bool = Field(False, description="Whether each response must meet it; asked as yes or no.")


class ComparedSection(OtherJudgeSection):
    """One of ``label.compare``."""

    labeler: Component | None = Field(None, description="The labeler, with its options.")


class RankingSection(Section):
    """``label.ranking``: rank each prompt's responses by a Bradley-Terry model of the judge's answers."""

    method: Literal["tournament", "all_pairs"] = Field(
        description="tournament: ask about the most uncertain pairs so far; all_pairs: ask about every pair."
    )
    questions: int | None = Field(
        None,
        ge=1,
        description="Questions per prompt in a tournament, each about a pair in one order; null: a third of all.",
    )
    at_once: int = Field(
        1, ge=1, description="Questions per prompt in one round of a tournament; more mean fewer, less informed rounds."
    )
    confidence: Number = Field(
        0.95,
        ge=0.5,
        le=1,
        description="Stop asking about a prompt once the order of each of its pairs has this probability.",
    )


class JurySection(Section):
    """``label.jury``: combine the main labeler and those of ``label.compare``."""

    join: Literal["log_odds", "dawid_skene"] = Field(
        "log_odds",
        description="log_odds: mean of the members' log-odds, weighted by their agreement with the others; "
        "dawid_skene: posterior under independent errors, with an error rate for each member.",
    )
    max_disagreement: Number | None = Field(
        None,
        ge=0,
        le=0.5,
        description="Leave out pairs with fewer than two votes, or whose votes have a larger standard deviation.",
    )


class BudgetSection(Section):
    """How much labeling may use of judges on servers."""

    tokens: int | None = Field(None, ge=1, description="Input and output tokens; null: no limit.")
    cost: Number | None = Field(None, gt=0, description="Cost in the currency of judge.price; null: no limit.")

    @model_validator(mode="after")
    def _limited(self) -> BudgetSection:
        if self.tokens is None and self.cost is None:
            raise ValueError("Give tokens or cost.")
        return self


class LabelSection(Section):
    """``label``: preferences from a judge."""

    labeler: Component = Field(ComponentRef("distilled"), description="The labeler, with its options.")
    judge: Judge = Field("same", description=JUDGES)
    prompt: PromptFolder = Field("general", description="A packaged prompt's name or a prompt folder.")
    criteria: dict[SafeName, Annotated[Number, Field(gt=0), AfterValidator(exact_weight)] | CriterionSection] = Field(
        default_factory=dict,
        description="Criteria that replace the single question, each asked separately: a weight, or {description: ..., "
        "weight: 1, veto: false}; for labelers with the option criteria.",
    )
    batch_tokens: int = Field(2048, ge=1, description="Tokens per batch of the judge.")
    precision: Literal["auto", "highest", "high", "medium"] = Field(
        "auto",
        description="Precision of float32 matrix products; auto: the fastest that changes labels by less than 1e-4.",
    )
    min_confidence: Number = Field(0.5, ge=0.5, le=1, description="Leave out pairs whose label is less confident.")
    calibration: DataPath | None = Field(
        None,
        description="Pairs judged by people (20 or more) to calibrate labels on; used if cross-validation shows "
        "that it helps.",
    )
    ranking: RankingSection | None = Field(
        None, description="Rank each prompt's responses and label its pairs by the ranking's probabilities."
    )
    compare: dict[Annotated[str, name_besides("label", "the main labeler's")], ComparedSection] = Field(
        default_factory=dict, description="Additional labelers by name, which the report compares with the main one."
    )
    jury: JurySection | None = Field(
        None, description="Combine the main labeler with those of compare; null: the main one labels alone."
    )

    budget: BudgetSection | None = Field(
        None,
        description="Budget of tokens or money for judges on servers; labeling stops when it is spent.",
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
            raise ValueError("Every one of the criteria is a veto. Add at least one that responses are judged by.")
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
