"""Gradient checkpointing where a recipe does not set it: only where activations would not fit into memory."""

from __future__ import annotations

from trl_rlaif import distributed, hardware
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.progress import say
from trl_rlaif.recipe import Recipe

CHECKPOINTING = "gradient_checkpointing"
# The planner's peaks are within a tenth of what autograd keeps (tests/memory).
_SAFE = 0.9
# What says how long the rows of a stage may be. Without it the planner can but assume a length.
_LENGTHS = {"sft": "max_length", "judge": "max_length", "reward": "max_length", "rl": "max_prompt_length"}


def settle_checkpointing(recipe: Recipe, stage: str) -> Recipe:
    """A recipe that says whether a stage recomputes activations; one that says so already is returned as it is.

    It changes no result, only time and memory. So it is decided by the machine that runs the stage, and a run that is
    resumed on a smaller GPU decides again.

    Args:
        recipe: Of a run, with settled dtypes.
        stage: ``sft``, ``reward`` or ``rl``.
    """
    from trl_rlaif.memory.settings import with_settings

    if CHECKPOINTING in getattr(recipe, stage).config:
        return recipe
    return with_settings(recipe, {(stage, CHECKPOINTING): _needed(recipe, stage)})


def _needed(recipe: Recipe, stage: str) -> bool:
    device = hardware.device_type()
    peak = _peak(recipe, stage, device)
    if peak is None:  # a GPU is filled soon
        return device != "cpu"
    room = hardware.available_memory(device)
    if device == "cpu":  # which all processes of the machine share
        room //= distributed.processes_here()
    needed = peak > _SAFE * room
    if distributed.processes() > 1:  # all do the same, or sharded weights would be gathered in one process alone
        from accelerate.utils import gather_object

        distributed.join()
        needed = any(gather_object([needed]))
    say(
        f"{stage}: gradient checkpointing is {'on' if needed else 'off'}: {peak / 2**30:.1f} GiB are predicted without "
        f"it, and {room / 2**30:.1f} GiB are available."
    )
    return needed


def _peak(recipe: Recipe, stage: str, device: str) -> int | None:
    """Predicted bytes of a stage's updates if activations are kept; None where the planner cannot tell."""
    from trl_rlaif.memory import CONTEXT_BYTES, MARGIN, plan_memory
    from trl_rlaif.memory.settings import setting, with_settings

    if device not in ("cpu", "cuda") or setting(recipe, stage, _LENGTHS[stage]) is None:
        return None
    changes: dict[tuple[str, str], object] = {(stage, CHECKPOINTING): False}
    if stage == "rl":
        from trl_rlaif.rl.ppo.update_step import CPU_TOKENS

        # Of TRL's trainers it is not known what they hold, nor of vLLM.
        algorithm = ALGORITHMS[recipe.rl.algorithm]
        if algorithm.config or algorithm.needs_selector or setting(recipe, "rl", "generation") == "vllm":
            return None
        if device == "cpu" and setting(recipe, "rl", "micro_batch_tokens") is None:
            changes["rl", "micro_batch_tokens"] = CPU_TOKENS
    try:
        plan = plan_memory(with_settings(recipe, changes), only=stage)
        return CONTEXT_BYTES + int((1 + MARGIN) * plan.predict("update", stage))
    except Exception:  # the planner knows decoders like Llama's; others may lack whatever it reads
        return None
