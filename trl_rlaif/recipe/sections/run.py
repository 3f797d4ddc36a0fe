"""The sections ``run``, ``rounds`` and ``report``, which concern the whole run."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from trl_rlaif.recipe.sections.values import Named, Number, SafeName, Section, Text

# Optimizations that do not change the results; see trl_rlaif.models.kernels.
Kernel = Literal["packing", "fused_lora", "logprob_head", "cpu_attention", "cast_weights", "static_cache"]

KERNELS = get_args(Kernel)


class RunSection(Section):
    """``run``: settings of the whole run."""

    name: SafeName = Field(description="Name of the run and its folder. Default: the name of the recipe file.")
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Random seed of the run.")
    kernels: dict[Kernel, Literal["auto"] | bool] = Field(
        default_factory=dict, description=f"Optimizations, each true, false or auto: {', '.join(KERNELS)}."
    )


class ReportSection(Section):
    """``report``: one HTML page at the end. It has no keys."""


class RoundsSection(Section):
    """``rounds``: repeat sample, label, reward and rl, each time starting from the latest policy."""

    number: int = Field(1, ge=1, description="Number of rounds; rounds: 3 is short for rounds: {number: 3}.")
    previous: Annotated[Text, Named("trained_run")] | None = Field(
        None,
        description="Folder of a run that this one continues, with its policy, reward model and taught judge.",
    )
    reference: Literal["initial", "previous"] = Field(
        "initial",
        description="The reference policy of rl: the policy before the first round, or the one at the start of the "
        "current round.",
    )
    earlier: Number = Field(
        0.5, ge=0, le=1, description="Fraction of earlier rounds' preferences that the reward model trains on again."
    )

    @model_validator(mode="after")
    def _repeats(self) -> RoundsSection:
        if "number" not in self.model_fields_set and self.previous is None:
            raise ValueError("Write how many rounds, such as number: 3, or the run before this one as previous.")
        return self

    @property
    def repeats(self) -> bool:
        """Whether there are several rounds, or one that continues another run."""
        return self.number > 1 or self.previous is not None
