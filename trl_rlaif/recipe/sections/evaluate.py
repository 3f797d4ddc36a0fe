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

# The name of an evaluated set whose prompts the start is good at.
FORGET_SET = "forget"


class FurtherJudgeSection(OtherJudgeSection):
    """One of ``evaluate.judges``."""

    @model_validator(mode="after")
    def _differs(self) -> FurtherJudgeSection:
        if self.judge is None and self.prompt is None:
            raise ValueError("Name its judge, its prompt or both: it would be the main judge.")
        return self


class EvaluateSection(Section):
    """``evaluate``: the trained policy against the start."""

    judge: Judge = Field("same", description=JUDGES)
    prompt: PromptFolder | None = Field(None, description="A prompt as in label; null takes label's.")
    judges: dict[Annotated[str, name_besides("judge", "the main judge's")], FurtherJudgeSection] = Field(
        default_factory=dict,
        description="More judges by name, asked one after the other: how far they agree is measured.",
    )
    harmless: Annotated[Text, Named("rating_prompt")] | None = Field(
        None,
        description="A prompt, such as harmlessness, with which the judge rates both responses from 1 to 10: the share "
        "above the middle is the harmless rate. null measures none.",
    )
    sets: dict[SafeName, DataPath] = Field(
        default_factory=dict, description="Prompts by name; empty takes data.eval_prompts as 'test'."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest response in tokens; null takes rl.response_length or sample's."
    )
    temperature: Number = Field(0.0, ge=0, description="Sampling temperature; 0 decodes greedily.")
    num_responses: int = Field(
        1, ge=1, description="Responses a prompt of each policy: rewards are means over all, the first is judged."
    )
    batch_size: int = Field(16, ge=1, description="Sequences generated or judged at once.")
    track_every: int | None = Field(
        None,
        ge=0,
        description="Updates of rl between measurements of the sets while it runs; 0: none; null: ten over the run, "
        f"where there is a set '{FORGET_SET}'.",
    )
    track_prompts: int = Field(64, ge=1, description="Prompts of each set that these measure, drawn at random.")
    stop_on_forgetting: Number | None = Field(
        None,
        ge=0,
        lt=0.5,
        description=f"rl ends when the win rate against the start on the set '{FORGET_SET}' falls below 0.5 less this.",
    )
