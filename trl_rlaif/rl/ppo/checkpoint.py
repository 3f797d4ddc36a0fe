"""Checkpoints of a PPO run, written whole or not at all, from which it goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object

from trl_rlaif import run_identity
from trl_rlaif.errors import UserError
from trl_rlaif.rl import deepspeed
from trl_rlaif.rl.selection import MergedSelection

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.trainer import PPOTrainer

_NAME = re.compile(r"checkpoint-(\d+)")
_CONTENT = "content.json"
_BEST_FIELDS = ("best_metric", "best_model_checkpoint", "best_global_step")
_RESTORED = ("global_step", "episode", "epoch", "log_history", *_BEST_FIELDS)
BEST = "objective/rlhf_reward"


def find(folder: str | Path, wanted: str | Path | bool | None) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: Where the run keeps its checkpoints.
        wanted: True for the newest one (None if there is none), a path, or None/False for a fresh start.

    Raises:
        UserError: The path given is no checkpoint.
    """
    if not wanted:
        return None
    if wanted is True:
        found = _all(Path(folder))
        return found[-1] if found else None
    if not _is_whole(Path(wanted)):
        what = "This is no PPO checkpoint, or only a part of one."
        raise UserError(what, where=str(wanted), fix="Give a folder checkpoint-N.")
    return Path(wanted)


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first: one is given its name only when it is complete."""
    names = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and _is_whole(p)]
    return sorted(names, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _CONTENT)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _is_whole(folder: Path) -> bool:
    """Whether every file is there in its full length: a disk may lose what a power cut caught in its cache."""
    try:
        return json.loads((folder / _CONTENT).read_text(encoding="utf-8")) == _sizes(folder)
    except (OSError, ValueError):
        return False


def _is_best(trainer: PPOTrainer) -> bool:
    """Whether the updates since the last checkpoint were the best so far, by ``metric_for_best_model``."""
    args, state = trainer.args, trainer.state
    name = args.metric_for_best_model or BEST
    last = trainer.last_saved_step
    recent = [entry[name] for entry in state.log_history if name in entry and entry["step"] > last]
    trainer.last_saved_step = state.global_step
    if not recent:
        return False
    mean = sum(recent) / len(recent)
    sign = -1 if args.greater_is_better is False else 1
    if state.best_metric is not None and sign * mean <= sign * state.best_metric:
        return False
    state.best_metric = mean
    return True


def save(trainer: PPOTrainer, own: dict[str, Any] | None = None) -> Path:
    """Write ``checkpoint-N`` into the output folder and drop what exceeds ``save_total_limit``.

    The best one stays beside the last ones: that before which the mean of ``metric_for_best_model``
    (objective/rlhf_reward, unless the arguments name another) was highest. ``trainer_state.json`` names it.
    Of several processes the first one writes, and the others wait for it; with DeepSpeed each one adds its
    share of the optimizer.

    Args:
        trainer: Whose run it is.
        own: What ``own_state`` gave of this process at an earlier moment, from which a resumed run continues; None
            takes the present one.
    """
    root = Path(trainer.args.output_dir)
    target = root / f"checkpoint-{trainer.state.global_step}"
    building = root / f".building-{target.name}"
    accelerator = trainer.accelerator
    state = _state(trainer, own)  # every process adds its own part
    if accelerator.is_main_process:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    accelerator.wait_for_everyone()
    deepspeed.save_share(accelerator, trainer.optimizer, building)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write(trainer, state, building, target)
    accelerator.wait_for_everyone()
    return target


def _write(trainer: PPOTrainer, state: dict[str, Any], building: Path, target: Path) -> None:
    trainer.save_model(str(building), _internal_call=True)
    torch.save(state, building / "training.pt")
    if _is_best(trainer):
        trainer.state.best_model_checkpoint = str(target)
        trainer.state.best_global_step = trainer.state.global_step
    trainer.state.save_to_json(str(building / "trainer_state.json"))
    (building / run_identity.FILE).write_text(json.dumps(trainer.identity, indent=1), encoding="utf-8")
    (building / _CONTENT).write_text(json.dumps(_sizes(building)), encoding="utf-8")
    _sync(building)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(building, target)
    limit = trainer.args.save_total_limit
    for old in _all(target.parent)[:-limit] if limit else []:
        if str(old) != trainer.state.best_model_checkpoint:
            shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Force the files to disk before the folder gets its name: after a power cut the name must not lie."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _trainable(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def _state(trainer: PPOTrainer, own: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "parameters": _trainable(trainer),
        "optimizer": None if deepspeed.enabled(trainer.accelerator) else trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "chosen": None if trainer.selection.chosen is None else trainer.selection.chosen.to_dict(),
        "selected_at": trainer.selection.at,
        "kl_coef": trainer.kl_controller.coef,
        "processes": gather_object([own_state(trainer) if own is None else own]),
    }


def own_state(trainer: PPOTrainer) -> dict[str, Any]:
    """What differs from process to process: the place in the data, random generators, what scoring remembers."""
    return {
        "batches": trainer.batches.state_dict(),
        "minibatch_order": trainer.minibatch_order.get_state(),
        "rehearsal": trainer.rehearsal.state_dict(),
        **trainer.rewards.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load(trainer: PPOTrainer, folder: Path) -> None:
    """Put everything back as it was when the checkpoint was written.

    Raises:
        UserError: The checkpoint belongs to a run with other settings or prompts, another model, other transforms or
            another number of processes.
    """
    run_identity.check(folder, trainer.identity)
    # Our own file: it holds the random generators' states, which are no tensors.
    state = torch.load(folder / "training.pt", map_location="cpu", weights_only=False)
    own = _trainable(trainer)
    if own.keys() != state["parameters"].keys():
        raise UserError("The checkpoint belongs to another model or LoRA configuration.", where=str(folder))
    if len(state["processes"]) != trainer.accelerator.num_processes:
        raise UserError(
            f"The checkpoint was written by {len(state['processes'])} processes; these are "
            f"{trainer.accelerator.num_processes}.",
            where=str(folder),
        )
    mine = state["processes"][trainer.accelerator.process_index]
    if len(mine["transforms"]) != len(trainer.rewards.transforms):
        raise UserError("The checkpoint was written with other reward transforms.", where=str(folder))
    for name, value in state["parameters"].items():
        own[name].copy_(value)
    if deepspeed.enabled(trainer.accelerator):
        deepspeed.load_share(trainer.accelerator, trainer.optimizer, folder)
    elif state["optimizer"] is None:
        raise UserError("The checkpoint was written with DeepSpeed.", where=str(folder))
    else:
        trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    trainer.rewards.load_state_dict(mine)
    # What was chosen stays: the place in the data is a place in that.
    if state["chosen"] is not None:
        trainer.apply(MergedSelection.from_dict(state["chosen"]))
    trainer.selection.at = state.get("selected_at")  # checkpoints of earlier versions have none
    trainer.rehearsal.load_state_dict(mine["rehearsal"])
    trainer.batches.load_state_dict(mine["batches"])
    trainer.kl_controller.coef = state["kl_coef"]
    trainer.minibatch_order.set_state(mine["minibatch_order"])
    _load_trainer_state(trainer, folder)
    random.setstate(mine["python"])
    np.random.set_state(mine["numpy"])
    torch.set_rng_state(mine["torch"])
    if mine["cuda"]:
        torch.cuda.set_rng_state_all(mine["cuda"])


def _load_trainer_state(trainer: PPOTrainer, folder: Path) -> None:
    saved = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(trainer.state)}
    for name in _RESTORED:
        if name in known and name in saved:
            setattr(trainer.state, name, saved[name])
    trainer.last_saved_step = trainer.state.global_step
