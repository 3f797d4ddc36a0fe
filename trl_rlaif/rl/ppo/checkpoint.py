"""Checkpoints of a PPO run, written atomically, from which it resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import set_seed

from trl_rlaif import content, run_identity
from trl_rlaif.errors import UserError
from trl_rlaif.files import sync
from trl_rlaif.generation import derived_seed, random_state, set_random_state
from trl_rlaif.models.sharding import gather_again
from trl_rlaif.progress import say
from trl_rlaif.rl import deepspeed
from trl_rlaif.states import load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState

    from trl_rlaif.rl.ppo.config import PPOConfig
    from trl_rlaif.rl.scoring import RewardPipeline

_NAME = re.compile(r"checkpoint-(\d+)")
_TRAINING = "training.pt"
_BEST_FIELDS = ("best_metric", "best_model_checkpoint", "best_global_step")
_RESTORED = ("global_step", "episode", "epoch", "log_history", *_BEST_FIELDS)
BEST = "objective/rlhf_reward"


class Part(Protocol):
    """A collaborator with state: entries of the checkpoint under its own names."""

    def state_dict(self) -> dict[str, Any]:
        """Its entries, as plain values that later training does not change."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; ``state`` holds the other parts' entries too."""


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        args: Output folder, how many to keep, and the metric that decides which is best.
        accelerator: Of all processes.
        state: The trainer's.
        model, optimizer, scheduler: What is trained, as accelerate prepared it.
        common: Parts that are the same in all processes.
        own: Parts that differ from process to process.
        rewards: Another of these, restored to its earlier state when a reward fails.
        save_model: Writes the policy into a folder.
        identity: Returns the settings and prompts of this run, which a checkpoint's must equal.
    """

    args: PPOConfig
    accelerator: Accelerator
    state: TrainerState
    model: nn.Module
    optimizer: Any
    scheduler: Any
    common: Sequence[Part]
    own: Sequence[Part]
    rewards: RewardPipeline
    save_model: Callable[[str], None]
    identity: Callable[[], dict[str, Any]]
    _last_saved: int = 0

    # ---- Writing --------------------------------------------------------------------------------------

    @contextmanager
    def kept(self, *, repeated: bool = True) -> Iterator[None]:
        """Save a checkpoint if a reward fails inside.

        Args:
            repeated: A resumed run repeats the body, with the same prompts and random numbers. False: it continues
                after it.
        """
        before = self._own_state()
        try:
            yield
        except UserError:
            if repeated:
                self.rewards.load_state_dict(before)
            self.save(before if repeated else None)
            raise

    def save(self, own: dict[str, Any] | None = None) -> Path:
        """Write ``checkpoint-N`` into the output folder and delete those beyond ``save_total_limit``.

        The best one is kept besides the last ones: the one with the highest mean of ``metric_for_best_model``
        (by default objective/rlhf_reward) since its predecessor. ``trainer_state.json`` names it.
        The main process writes while the others wait; with DeepSpeed each process adds its optimizer shard.

        Args:
            own: This process's state at an earlier moment, from which a resumed run continues; None: the current
                state.
        """
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        building = target.with_name(f".building-{target.name}")
        accelerator = self.accelerator
        state = {
            "parameters": self._trainable(),
            "optimizer": None if deepspeed.enabled(accelerator) else self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **_joined(self.common),
            "processes": gather_object([own or self._own_state()]),
        }
        if accelerator.is_main_process:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        accelerator.wait_for_everyone()
        deepspeed.save_share(accelerator, self.optimizer, building)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._write(state, building, target)
        accelerator.wait_for_everyone()
        gather_again(self.model)
        return target

    def _write(self, training: dict[str, Any], building: Path, target: Path) -> None:
        state = self.state
        self.save_model(str(building))
        save_state(training, building / _TRAINING)
        if self._is_best():
            state.best_model_checkpoint, state.best_global_step = str(target), state.global_step
        state.save_to_json(str(building / "trainer_state.json"))
        (building / run_identity.FILE).write_text(json.dumps(self.identity(), indent=1), encoding="utf-8")
        content.record(building)
        _sync(building)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(building, target)
        limit = self.args.save_total_limit
        # Later ones, which a resumed run skipped or was not told to use, go first.
        kept = sorted(_all(target.parent), key=lambda path: (_step(path) <= state.global_step, _step(path)))
        for old in kept[:-limit] if limit else []:
            if str(old) != state.best_model_checkpoint:
                shutil.rmtree(old, ignore_errors=True)

    def _is_best(self) -> bool:
        """Whether the updates since the last checkpoint were the best so far, by ``metric_for_best_model``."""
        args, state, name = self.args, self.state, self.args.metric_for_best_model or BEST
        recent = [entry[name] for entry in state.log_history if name in entry and entry["step"] > self._last_saved]
        self._last_saved = state.global_step
        if not recent:
            return False
        mean = sum(recent) / len(recent)
        sign = -1 if args.greater_is_better is False else 1
        if state.best_metric is not None and sign * mean <= sign * state.best_metric:
            return False
        state.best_metric = mean
        return True

    def _trainable(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p.data for name, p in model.named_parameters() if p.requires_grad}

    def _own_state(self) -> dict[str, Any]:
        """The state that differs between processes: the parts, and the random generators."""
        cpu, cuda = random_state()
        name, words, *place = np.random.get_state()
        numpy = (name, np.asarray(words).tolist(), *place)
        generators = {"python": random.getstate(), "numpy": numpy, "torch": cpu, "cuda": cuda}
        return _joined([*self.own, self.rewards]) | generators

    # ---- Resuming -------------------------------------------------------------------------------------

    def resume(self, wanted: str | Path | bool | None) -> None:
        """Restore everything from a checkpoint; start from scratch if ``find`` finds none.

        Raises:
            UserError: The checkpoint belongs to a run with other settings, prompts, model or transforms; or, with
                DeepSpeed, another number of processes.
            RunError: One of its files is damaged.
        """
        folder = find(self.args.output_dir, wanted)
        if folder is not None:
            self._load(folder)
        self._last_saved = self.state.global_step

    def _load(self, folder: Path) -> None:
        run_identity.check(folder, self.identity())
        state = load_state(folder / _TRAINING)
        parameters, mine = self._trainable(), part_of_process(state["processes"], self.accelerator)
        if parameters.keys() != state["parameters"].keys():
            raise UserError("The checkpoint belongs to another model or LoRA configuration.", where=str(folder))
        self.rewards.load_state_dict(mine)
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
        if deepspeed.enabled(self.accelerator):
            deepspeed.load_share(self.accelerator, self.optimizer, folder)
        elif state["optimizer"] is None:
            raise UserError("The checkpoint was written with DeepSpeed.", where=str(folder))
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for part in self.common:  # before the others: the data position refers to the selected prompts
            part.load_state_dict(state)
        for part in self.own:
            part.load_state_dict(mine)
        saved = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(self.state)}
        for name in known.intersection(_RESTORED, saved):
            setattr(self.state, name, saved[name])
        random.setstate(mine["python"])
        np.random.set_state(mine["numpy"])
        set_random_state((mine["torch"], mine["cuda"]))
        if self.accelerator.process_index >= len(state["processes"]):
            set_seed(derived_seed(self.args.seed, self.state.global_step, self.accelerator.process_index))


def _joined(parts: Sequence[Part]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.state_dict().items()}


def part_of_process(parts: Sequence[Any], accelerator: Accelerator) -> Any:
    """This process's part of a checkpoint; the last process's if fewer processes wrote it.

    Raises:
        UserError: It was written by another number of processes, and its optimizer is sharded over them.
    """
    if deepspeed.enabled(accelerator) and len(parts) != accelerator.num_processes:
        what = f"The checkpoint was written by {len(parts)} processes; these are {accelerator.num_processes}."
        raise UserError(what, fix="With DeepSpeed, resume with as many.")
    return parts[min(accelerator.process_index, len(parts) - 1)]


def find(folder: str | Path, wanted: str | Path | bool | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        folder: Where the run keeps its checkpoints.
        wanted: True for the newest one (None if there is none), a path, or None/False for a fresh start.

    Raises:
        UserError: The given path is not a checkpoint, or is damaged.
    """
    if not wanted:
        return None
    if wanted is True:
        for found in reversed(_all(Path(folder), skipped=True)):
            damaged = content.damaged(found)
            if damaged is None:
                return found
            say(f"Warning: {damaged} is not what was written. The run continues from the previous one, if any.")
        return None
    if not _is_whole(Path(wanted)):
        what = "This is no PPO checkpoint, or only a part of one."
        raise UserError(what, where=str(wanted), fix="Give a folder checkpoint-N.")
    damaged = content.damaged(Path(wanted))
    if damaged is not None:
        raise UserError("The file is not what was written.", where=str(damaged), fix="Give an earlier checkpoint.")
    return Path(wanted)


def _all(folder: Path, *, skipped: bool = False) -> list[Path]:
    """Complete checkpoints, oldest first: one gets its name only when it is complete.

    Args:
        skipped: Report the incomplete ones.
    """
    names = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    whole = []
    for path in sorted(names, key=_step):
        if _is_whole(path):
            whole.append(path)
        elif skipped:
            say(f"Warning: {path} is not whole, or an earlier version wrote it. It is passed over.")
    return whole


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _is_whole(folder: Path) -> bool:
    """Whether every file is there."""
    names = content.recorded(folder)
    return _TRAINING in names and all((folder / name).is_file() for name in names)


def _sync(folder: Path) -> None:
    """Sync the files to disk before the folder gets its name, which must imply completeness after a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
