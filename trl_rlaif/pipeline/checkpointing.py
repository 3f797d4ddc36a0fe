"""Chooses gradient checkpointing if a recipe does not: only if activations would not fit into memory."""

from __future__ import annotations

from trl_rlaif import distributed, hardware
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.progress import say
from trl_rlaif.recipe import Recipe

CHECKPOINTING = "gradient_checkpointing"
# The planner's peaks are within 10% of what autograd keeps (tests/memory).
_SAFE = 0.9
# The setting that limits the length of a stage's rows. Without it, the planner can only assume a length.
_LENGTHS = {"sft": "max_length", "judge": "max_length", "reward": "max_length", "rl": "max_prompt_length"}


def settle_checkpointing(recipe: Recipe, stage: str) -> Recipe:
    """Set gradient checkpointing of a stage; a recipe that sets it already is returned unchanged.

    It affects only time and memory, not results. So the machine that runs the stage decides, and a run resumed on a
    smaller GPU decides again.

    Args:
        recipe: A run's recipe with resolved dtypes.
        stage: ``sft``, ``judge``, ``reward`` or ``rl``.
    """
    from trl_rlaif.memory.settings import with_settings

    if CHECKPOINTING in getattr(recipe, stage).config:
        return recipe
    return with_settings(recipe, {(stage, CHECKPOINTING): _needed(recipe, stage)})


def _needed(recipe: Recipe, stage: str) -> bool:
    device = hardware.device_type()
    peak = _peak(recipe, stage, device)
    if peak is None:  # a GPU is likely to run out of memory
        return device != "cpu"
    room = hardware.available_memory(device)
    if device == "cpu":  # shared by all processes of the machine
        room //= distributed.processes_here()
    needed = peak > _SAFE * room
    if distributed.processes() > 1:  # all must agree: sharded weights are gathered by all processes
        from accelerate.utils import gather_object

        distributed.join()
        needed = any(gather_object([needed]))
    say(
        f"{stage}: gradient checkpointing is {'on' if needed else 'off'}: {peak / 2**30:.1f} GiB are predicted without "
        f"it, and {room / 2**30:.1f} GiB are available."
    )
    return needed


def _peak(recipe: Recipe, stage: str, device: str) -> int | None:
    """Predicted peak bytes of a stage's updates without checkpointing; None if the planner cannot predict them."""
    from trl_rlaif.memory import CONTEXT_BYTES, MARGIN, plan_memory
    from trl_rlaif.memory.settings import setting, with_settings

    if device not in ("cpu", "cuda") or setting(recipe, stage, _LENGTHS[stage]) is None:
        return None
    changes: dict[tuple[str, str], object] = {(stage, CHECKPOINTING): False}
    if stage == "rl":
        from trl_rlaif.rl.ppo.update_step import CPU_TOKENS

        # The memory of TRL's trainers and of vLLM is unknown.
        algorithm = ALGORITHMS[recipe.rl.algorithm]
        if algorithm.config or algorithm.needs_selector or setting(recipe, "rl", "generation") == "vllm":
            return None
        if device == "cpu" and setting(recipe, "rl", "micro_batch_tokens") is None:
            changes["rl", "micro_batch_tokens"] = CPU_TOKENS
    try:
        plan = plan_memory(with_settings(recipe, changes), only=stage)
        return CONTEXT_BYTES + int((1 + MARGIN) * plan.predict("update", stage))
    except Exception:  # the planner supports decoders like Llama; others may lack attributes that it reads
        return None
