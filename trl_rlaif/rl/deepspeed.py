"""DeepSpeed ZeRO: configuration of its engine, and each process's optimizer shard in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from trl_rlaif.errors import UserError
from trl_rlaif.states import load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator


class NoRewardModel(nn.Module):
    """Passed to TRL's trainer where there is no reward model.

    TRL moves it to the device, or wraps it in a DeepSpeed engine, which reads its ``config``.
    """

    config = None


def enabled(accelerator: Accelerator) -> bool:
    """Whether the process was started with DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def tell(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Configure DeepSpeed's engine, which is built next, to do what the loop does without it.

    Raises:
        UserError: Stage 3, which shards the weights: the loop reads them outside of the engine.
    """
    if not enabled(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise UserError("PPO does not run with ZeRO-3, which shards the weights.", fix="Set zero_stage: 2.")
    settings = plugin.deepspeed_config
    # TRL's loop clips no gradients, and neither does ours; accelerate would fill in 1.
    if settings.get("gradient_clipping", "auto") == "auto":
        settings["gradient_clipping"] = 0.0
    # `args.bf16` decides, through autocast. DeepSpeed's own would round the trained weights in every pass.
    settings["bf16"] = settings["fp16"] = {"enabled": False}
    # DeepSpeed drops empty groups, and the scheduler, which is built on these, would count one more.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def take_back_models(trainer: Any) -> None:
    """Unwrap a trainer's models: only the one that is trained needs DeepSpeed's engine."""
    if enabled(trainer.accelerator):
        trainer.deepspeed = trainer.model  # TRL's save_model expects it
        if trainer.ref_model is not None:
            trainer.ref_model = trainer.accelerator.unwrap_model(trainer.ref_model)


def save_share(accelerator: Accelerator, optimizer: Any, folder: Path) -> None:
    """Write this process's optimizer shard, if the optimizer is sharded."""
    if enabled(accelerator):
        save_state(optimizer.state_dict(), _share(accelerator, folder), _classes())


def load_share(accelerator: Accelerator, optimizer: Any, folder: Path) -> None:
    """Restore this process's optimizer shard.

    Raises:
        UserError: The checkpoint has no optimizer shards.
    """
    file = _share(accelerator, folder)
    if not file.exists():
        raise UserError("The checkpoint was written without DeepSpeed.", where=str(folder))
    state = load_state(file, _classes())
    states = [state] * accelerator.num_processes  # it reads only its own
    optimizer.optimizer.load_state_dict(states, load_from_fp32_weights=True)


def _share(accelerator: Accelerator, folder: Path) -> Path:
    return folder / f"optimizer-{accelerator.process_index}.pt"


def _classes() -> list[type]:
    """The classes in DeepSpeed's state besides tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
