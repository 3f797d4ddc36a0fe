"""Reward model, PPO, RLOO and GRPO with FSDP2. Run as a script (tests/ on PYTHONPATH), this is one of two processes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from helpers import group_processes, ppo_task, reward_processes
from helpers.forked import allow_fsdp_on_cpu
from helpers.processes import write_result
from trl_rlaif.models import sharding
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.rl.grpo_rloo import trainer as group_trainer

# Writing a checkpoint releases the weights that PPO gathered, in the process that writes it.
SAVING = {"save_strategy": "steps", "save_steps": 1}


def groups(folder: Path, model: str, algorithm: str, *, layers: bool) -> dict[str, Any]:
    """Three steps with rehearsal and checkpoints, with sharded or whole layers."""
    group_trainer.hand_over = partial(sharding.hand_over, layers=layers)
    return group_processes.ours(folder, model, algorithm, **group_processes.REHEARSED, **SAVING)


def nf4(path: str) -> dict[str, Any]:
    """A step on a sharded 4-bit base, and one on a whole base.

    Returns:
        For each of ``part``, ``gathered`` and ``whole``: loss; gradients of the adapters by name (not for
        ``gathered``); held, the number of elements that store one 4-bit weight in this process.
    """
    accelerator, found = Accelerator(cpu=True), {}
    tokens = torch.arange(3, 13)[None] + accelerator.process_index
    for name in ("whole", "part"):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(load_model(ModelSpec(path, "float32", "nf4")), lora)
        sharding.share_out(model, accelerator, layers=name == "part")
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found[name] = {"loss": loss.item(), "gradients": gradients, "held": _held(model)}
    with sharding.gathered(model), torch.no_grad():
        found["gathered"] = {"loss": model(input_ids=tokens, labels=tokens).loss.item(), "held": _held(model)}
    return found


def _held(model: Any) -> int:
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    return getattr(weight, "_local_tensor", weight).numel()


def main(output: str, model: str) -> None:
    """Each process writes its results to ``output/RANK.pt``."""
    allow_fsdp_on_cpu()
    torch.set_num_threads(1)
    folder = Path(output)
    found = {
        "nf4": nf4(model),
        "ppo": ppo_task.run(folder / "ppo", rows=4, **SAVING),
        "reward": reward_processes.run(folder / "reward", batch=2, rows=True),
    }
    for name in group_processes.TRAINERS:
        found[name] = groups(folder / name, model, name, layers=True)
        found[f"{name}, whole"] = groups(folder / f"{name}-whole", model, name, layers=False)
    write_result(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
