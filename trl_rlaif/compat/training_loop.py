"""Makes a resumed run of transformers' training loop end like an uninterrupted one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from trl_rlaif.files import write_atomically

_FILE = "totals.json"
# transformers' sum of logged losses and the step of the last log, and TRL's count of tokens. A version with other names
# starts counting at the resumed step, as it would without this.
_NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def resumable(trainer: Any, begin: Callable[[], Any]) -> Any:
    """Train such that a resumed run ends like an uninterrupted one; returns the result of ``begin``.

    Args:
        trainer: A trainer of transformers or TRL.
        begin: Calls its ``train``.
    """
    callbacks = (StopInTime(trainer), RunningTotals(trainer))
    for callback in callbacks:
        # Before callbacks that record which files a checkpoint contains.
        trainer.callback_handler.callbacks.insert(0, callback)
    try:
        return begin()
    except NothingLeft:
        return trainer._finalize_training(None, 0, time.time())
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)


class RunningTotals(TrainerCallback):
    """Saves running totals, and the random state that determines the data order, in checkpoints; restores them.

    A resumed run then logs what an uninterrupted one does, and trains on the same batches. Its mean loss
    (``training_loss``) is that of all steps, too.

    Args:
        trainer: A trainer of transformers or TRL.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._epoch: torch.Tensor | None = None  # the random state from which this epoch's order was drawn
        self._resumed: torch.Tensor | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the random state from which a sampler drew the order of a resumed epoch.

        transformers restores the checkpoint's random state only after it has skipped batches (seen in 5.23).
        """
        if self._resumed is not None:
            torch.set_rng_state(self._resumed)
            self._resumed = None
        self._epoch = torch.get_rng_state()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the totals, the random state, and each process's losses and metrics since the last log."""
        trainer, folder = self._trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        loss = getattr(trainer, "_tr_loss", None)
        found = {name: getattr(trainer, name) for name in _NUMBERS if hasattr(trainer, name)}
        pending = {name: list(values) for name, values in _pending(trainer).items() if values}
        between = self._epoch is None or float(state.epoch).is_integer()  # the next epoch draws from here
        order = (torch.get_rng_state() if between else self._epoch).numpy().tobytes().hex()
        own = {"loss": None if loss is None else loss.item(), "metrics": pending, "order": order}
        parts = gather_object([own])
        if state.is_world_process_zero and folder.is_dir():
            write_atomically(folder / _FILE, json.dumps({"numbers": found, "processes": parts}, default=float))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the totals from the loaded checkpoint."""
        trainer, path = self._trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
        if not state.global_step or not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        parts, index = found["processes"], trainer.accelerator.process_index
        as_many = len(parts) == trainer.accelerator.num_processes
        mine = parts[index if as_many else 0]  # data order and logged metrics are the same in all
        losses = [part["loss"] for part in parts if part["loss"] is not None]
        for name, value in found["numbers"].items():
            setattr(trainer, name, value)
        self._resumed = torch.frombuffer(bytearray.fromhex(mine["order"]), dtype=torch.uint8)
        _pending(trainer).update(mine["metrics"])
        if losses and hasattr(trainer, "_tr_loss"):  # the mean over the processes is logged
            trainer._tr_loss += mine["loss"] if as_many else fmean(losses)
            trainer._initial_global_step = 0  # the mean loss is of all steps


def _pending(trainer: Any) -> Any:
    """Values whose means TRL will log, by name."""
    return getattr(trainer, "_metrics", {}).get("train", {})


class NothingLeft(Exception):
    """Training was started with no steps left."""


class StopInTime(TrainerCallback):
    """Raises ``NothingLeft`` if all steps have been made, or a callback stopped training before the first one.

    transformers checks only after each step whether training is complete (seen in 5.23), so a run that is resumed
    from its last checkpoint would make an additional step.

    Args:
        trainer: A trainer of transformers or TRL.
    """

    def __init__(self, trainer: Any) -> None:
        self._ends = hasattr(trainer, "_finalize_training")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check before the first step.

        Raises:
            NothingLeft: No steps are left.
        """
        if self._ends and (control.should_training_stop or 0 < state.max_steps <= state.global_step):
            raise NothingLeft
