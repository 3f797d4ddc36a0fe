"""The sections ``data``, ``sft`` and ``sample``: prompts, pairs and supervised fine-tuning."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from trl_rlaif.data import COLUMNS, PairFormat, ScoredPairs
from trl_rlaif.recipe.formatting import nearest_or_all, shown
from trl_rlaif.recipe.sections.values import Component, DataPath, Number, Section, Text

# Sources with their own column names: keys of ``data``, and data named in other sections.
SOURCES = ("prompts", "eval_prompts", "pairs", "sft", "judge", "calibration", "rehearsal")


def known_columns(value: dict[str, str | dict[str, str]]) -> dict[str, str | dict[str, str]]:
    """Reject names of columns that are not read."""
    for key, column in value.items():
        if (key in SOURCES) != isinstance(column, dict):
            raise ValueError(f"'{key}' is {shown(column)}. " + nearest_or_all(key, COLUMNS, "Names that are read"))
        for name in column if isinstance(column, dict) else [key]:
            if name not in COLUMNS:
                raise ValueError(f"Nothing is read as '{name}'. " + nearest_or_all(name, COLUMNS, "Names"))
    return value


class DataSection(Section):
    """``data``: what the run reads."""

    prompts: DataPath | None = Field(None, description="Prompts to train on: a file, a folder or a Hub id.")
    max_prompts: int | None = Field(None, ge=1, description="Train on the first N prompts only; null uses all.")
    eval_prompts: DataPath | None = Field(None, description="Prompts to evaluate on: a file, a folder or a Hub id.")
    instruction: Text | None = Field(
        None, description="Text appended to the last user turn of every prompt, such as 'Answer in one sentence.'."
    )
    pairs: DataPath | None = Field(None, description="Existing pairs of responses, used instead of sampling.")
    format: PairFormat = Field("auto", description="Format of the pairs; auto detects it from their columns.")
    scored_pairs: ScoredPairs = Field(
        "all", description="Pairs to make of scored responses: all, or the best and the worst (best_worst)."
    )
    columns: Annotated[dict[str, Text | dict[str, Text]], AfterValidator(known_columns)] = Field(
        default_factory=dict,
        description="Column names in the files, such as {prompt: question}; for one source only: "
        "{eval_prompts: {prompt: text}}.",
    )
    category: Text = Field("category", description="Column with each prompt's category.")
    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Number of embedding clusters used as categories where prompts have none; auto: by silhouette.",
    )

    @model_validator(mode="after")
    def _one_category(self) -> DataSection:
        if self.category != "category" and any("category" in self.columns_of(source) for source in SOURCES):
            raise ValueError("Set category or columns.category, not both.")
        return self

    def columns_of(self, source: str) -> dict[str, str]:
        """The column names in a source's file.

        Args:
            source: One of SOURCES.
        """
        for_all = {key: column for key, column in self.columns.items() if isinstance(column, str)}
        return for_all | dict(self.columns.get(source, {}))


class SftSection(Section):
    """``sft``: supervised fine-tuning before all other stages. Accepts the other keys of SFTConfig."""

    data: DataPath = Field(description="Data to fine-tune on: a file, a folder or a Hub id.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of trl.SFTConfig.")


class SampleSection(Section):
    """``sample``: pairs of responses of the initial policy."""

    sampler: Component | None = Field(
        None, description="A pair sampler (plugin) with its options; null samples num_responses for each prompt."
    )
    num_responses: int = Field(2, ge=2, description="Responses sampled for each prompt.")
    temperature: Number = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Nucleus sampling: the probability mass to keep.")
    max_new_tokens: int = Field(128, ge=1, description="Maximum response length in tokens.")
    batch_size: int = Field(16, ge=1, description="Sequences generated per batch.")
    redraws: int = Field(3, ge=0, description="How often identical or empty responses are sampled again.")
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="Sampling seed; null uses run.seed.")
    keep_pairs: Literal["first", "all"] = Field(
        "first", description="Pairs to keep of a prompt's distinct responses: the first two, or all combinations."
    )

    @property
    def pairs_a_prompt(self) -> int:
        """Number of pairs that a prompt's responses form if all of them differ."""
        return math.comb(self.num_responses, 2) if self.keep_pairs == "all" else 1
