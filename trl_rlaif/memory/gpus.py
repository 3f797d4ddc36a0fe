"""Which GPUs a plan fits on, and which settings would make it fit on a smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trl_rlaif.memory.counting import ModelShape
from trl_rlaif.memory.plan import MemoryPlan, plan_memory
from trl_rlaif.memory.settings import rl_batch, setting, with_settings
from trl_rlaif.pipeline.inputs import BATCH
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.recipe import Recipe

# Nominal sizes of GPUs, in GB.
CARDS = (8, 12, 16, 24, 48, 80)
# The driver, error correction and often a display use the rest.
_USABLE = 0.97
TRAINED = tuple(name for name, stage in STAGES.items() if stage.trains)
_SHORTEST_RESPONSE = 32
# Maximum number of doublings of a setting that could be raised.
_DOUBLINGS = 3

Changes = dict[tuple[str, str], Any]


@dataclass(frozen=True)
class Advice:
    """Whether a plan fits on a GPU.

    Args:
        card: Its size in GB.
        fits: Whether the plan fits unchanged.
        settings: What would make it fit, as arguments of ``--set``; empty if it fits, or if nothing does.
    """

    card: int
    fits: bool
    settings: tuple[str, ...] = ()


def capacity(card: int) -> int:
    """Bytes that a run may use on a GPU of that many GB."""
    return int(card * 2**30 * _USABLE)


def advise(recipe: Recipe, shape: ModelShape, plan: MemoryPlan, cards: Sequence[int] = CARDS) -> list[Advice]:
    """For each GPU, whether the plan fits, and otherwise what would make it fit.

    Settings are tried in order of cost: first those that cost time, then those that change what is learned.

    Args:
        recipe: The recipe of the plan.
        shape: Shape of its model.
        plan: The plan.
        cards: Their sizes in GB.
    """
    advice = []
    for card in cards:
        room = capacity(card)
        fits = plan.peak <= room
        advice.append(Advice(card, fits, () if fits else _as_text(_first_that_fits(recipe, shape, room))))
    return advice


def raises(recipe: Recipe, shape: ModelShape, card: int) -> list[str]:
    """Settings that could be raised on a GPU that the plan fits on, each by itself, as arguments of ``--set``.

    Larger batches only save time; longer responses and 16-bit weights change what is learned.

    Args:
        recipe: A recipe that fits.
        shape: Shape of its model.
        card: Size in GB.
    """
    found = []
    for steps in _raises(recipe):
        fitting = [step for step in steps if plan_memory(with_settings(recipe, step), shape).peak <= capacity(card)]
        found += [" ".join(f"--set {text}" for text in _as_text(fitting[-1]))] if fitting else []
    return found


def _raises(recipe: Recipe) -> Iterator[list[Changes]]:
    """For each setting, increasing values."""
    for stage in (stage for stage in TRAINED if getattr(recipe, stage) is not None):
        rows, steps = (setting(recipe, stage, key) for key in BATCH[:2])
        larger: list[Changes] = []
        while steps and steps % 2 == 0:
            rows, steps = rows * 2, steps // 2
            larger.append({(stage, BATCH[0]): rows, (stage, BATCH[1]): steps})
        yield larger
    for key, size in _sizes(recipe).items():
        yield [{key: size * 2**i} for i in range(1, _DOUBLINGS + 1)]
    if recipe.rl is not None and (response := setting(recipe, "rl", "response_length")):
        yield [{("rl", "response_length"): response * 2**i} for i in range(1, _DOUBLINGS + 1)]
    if recipe.model.quantization == "nf4":
        yield [{("model", "quantization"): "none"}]


def _first_that_fits(recipe: Recipe, shape: ModelShape, room: int) -> Changes:
    """The first combination that fits, without unneeded changes; empty if there is none."""

    def fits(changes: Changes) -> bool:
        return plan_memory(with_settings(recipe, changes), shape).peak <= room

    taken: Changes = {}
    steps: list[Changes] = []
    for step in _steps(recipe):
        taken = taken | step
        steps.append(step)
        if fits(taken):
            return _needed(steps, fits)
    return {}


def _needed(steps: list[Changes], fits: Any) -> Changes:
    """The steps without unneeded ones; the costliest are dropped first."""
    kept = list(steps)
    for step in reversed(steps):
        others = [s for s in kept if s is not step]
        if fits(_joined(others)):
            kept = others
    return _joined(kept)


def _joined(steps: list[Changes]) -> Changes:
    return {key: value for step in steps for key, value in step.items()}


def _steps(recipe: Recipe) -> Iterator[Changes]:
    """Changes in order of cost."""
    trained = [stage for stage in TRAINED if getattr(recipe, stage) is not None]
    for stage in trained:
        if not setting(recipe, stage, "gradient_checkpointing"):
            yield {(stage, "gradient_checkpointing"): True}
    for stage in trained:
        if "8bit" not in str(setting(recipe, stage, "optim")):
            yield {(stage, "optim"): "paged_adamw_8bit"}
    for stage in trained:
        rows = setting(recipe, stage, "per_device_train_batch_size")
        steps = setting(recipe, stage, "gradient_accumulation_steps") or 1
        while rows > 1 and rows % 2 == 0:
            rows, steps = rows // 2, steps * 2
            yield {(stage, "per_device_train_batch_size"): rows, (stage, "gradient_accumulation_steps"): steps}
    if recipe.model.quantization == "none":
        # In 4 bits the stages compute in bfloat16, unless the recipe says otherwise.
        yield {("model", "quantization"): "nf4"}
    yield from _smaller_batches(recipe)
    if recipe.rl is not None:
        response = setting(recipe, "rl", "response_length")
        while response >= 2 * _SHORTEST_RESPONSE:
            response //= 2
            yield {("rl", "response_length"): response}


def _smaller_batches(recipe: Recipe) -> Iterator[Changes]:
    """Smaller batches where nothing is trained, which only cost time."""
    for key, size in _sizes(recipe).items():
        least = 512 if key == ("label", "batch_tokens") else 1
        while size >= 2 * least:
            size //= 2
            yield {key: size}


def _sizes(recipe: Recipe) -> dict[tuple[str, str], int]:
    """Batch sizes where nothing is trained."""
    sizes: dict[tuple[str, str], int] = {}
    if recipe.rl is not None:
        at_once = setting(recipe, "rl", "local_rollout_forward_batch_size") or 64
        sizes["rl", "local_rollout_forward_batch_size"] = min(at_once, rl_batch(recipe))
    for stage in ("sample", "evaluate"):
        if getattr(recipe, stage) is not None:
            sizes[stage, "batch_size"] = getattr(recipe, stage).batch_size
    if recipe.label is not None:
        sizes["label", "batch_tokens"] = recipe.label.batch_tokens
    return sizes


def _as_text(changes: Changes) -> tuple[str, ...]:
    def plain(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return tuple(f"{section}.{key}={plain(value)}" for (section, key), value in changes.items())
