"""The section ``evaluate``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trl_rlaif.recipe.sections.judges import JUDGES, Judge, OtherJudgeSection
from trl_rlaif.recipe.sections.values import (
    DataPath,
    Named,
    Number,
    PromptFolder,
    SafeName,
    Section,
    Text,
    name_besides,
)

# Name of the evaluation set of prompts that the initial policy is good at.
FORGET_SET = "forget"


class FurtherJudgeSection(OtherJudgeSection):
    """One of ``evaluate.judges``."""

    @model_validator(mode="after")
    def _differs(self) -> FurtherJudgeSection:
        if self.judge is None and self.prompt is None:
            raise ValueError("Name its judge, its prompt or both: it would be the main judge.")
        return self


class EvaluateSection(Section):
    """``evaluate``: compare the trained policy with the initial one."""

    judge: Judge = Field("same", description=JUDGES)
    prompt: PromptFolder | None = Field(
        None, description="A packaged prompt's name or a prompt folder; null uses that of label."
    )
    judges: dict[Annotated[str, name_besides("judge", "the main judge's")], FurtherJudgeSection] = Field(
        default_factory=dict,
        description="Additional judges by name, asked in turn; their agreement is measured.",
    )
    harmless: Annotated[Text, Named("rating_prompt")] | None = Field(
        None,
        description="A prompt, such as harmlessness, for rating both responses from 1 to 10; the fraction "
        "above the middle is the harmless rate. null: not measured.",
    )
    sets: dict[SafeName, DataPath] = Field(
        default_factory=dict, description="Sets of prompts by name; if empty, data.eval_prompts is the set 'test'."
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum response length in tokens; null uses rl.response_length or sample.max_new_tokens.",
    )
    temperature: Number = Field(0.0, ge=0, description="Sampling temperature; 0: greedy decoding.")
    num_responses: int = Field(
        1, ge=1, description="Responses per prompt and policy: rewards are averaged over all, the first is judged."
    )
    batch_size: int = Field(16, ge=1, description="Sequences generated or judged per batch.")
    track_every: int | None = Field(
        None,
        ge=0,
        description="Measure the sets during rl after this many updates; 0: never; null: ten times in all, "
        f"if there is a set '{FORGET_SET}'.",
    )
    track_prompts: int = Field(64, ge=1, description="Random prompts of each set that these measurements use.")
    stop_on_forgetting: Number | None = Field(
        None,
        ge=0,
        lt=0.5,
        description=f"Stop rl if the win rate over the initial policy on '{FORGET_SET}' falls below 0.5 minus this.",
    )
