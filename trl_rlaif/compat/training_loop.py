"""What transformers' training loop lacks for a resumed run to end as an undisturbed one."""

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
# transformers' sum of the losses that were logged and the step of the last log, and TRL's count of tokens. A version
# that calls them otherwise counts from where it was resumed, as without this.
_NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def resumable(trainer: Any, begin: Callable[[], Any]) -> Any:
    """Train so that a resumed run ends as an undisturbed one does; what ``begin`` returns.

    Args:
        trainer: Of transformers or TRL.
        begin: Calls its ``train``.
    """
    callbacks = (StopInTime(trainer), RunningTotals(trainer))
    for callback in callbacks:
        # Before those that tell which files a checkpoint has.
        trainer.callback_handler.callbacks.insert(0, callback)
    try:
        return begin()
    except NothingLeft:
        return trainer._finalize_training(None, 0, time.time())
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)


class RunningTotals(TrainerCallback):
    """Writes these numbers, and what the order of the data was drawn from, into each checkpoint, and takes them up.

    A resumed run logs what an undisturbed one does, and trains on the same batches.

    Its mean loss (``training_loss``) is that of all steps, too.

    Args:
        trainer: Of transformers or TRL.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._epoch: torch.Tensor | None = None  # the random state from which this epoch's order was drawn
        self._resumed: torch.Tensor | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the dataloader draw the order of a resumed epoch as it did: a sampler draws from torch's generator.

        transformers takes up the random state only after the batches that it skips (seen in 5.23).
        """
        if self._resumed is not None:
            torch.set_rng_state(self._resumed)
            self._resumed = None
        self._epoch = torch.get_rng_state()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them, and what was summed since the last log: of the losses in each process."""
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
        """Take them up from the checkpoint that was loaded."""
        trainer, path = self._trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
        if not state.global_step or not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        parts, index = found["processes"], trainer.accelerator.process_index
        as_many = len(parts) == trainer.accelerator.num_processes
        mine = parts[index if as_many else 0]  # what is drawn and logged is the same in all
        losses = [part["loss"] for part in parts if part["loss"] is not None]
        for name, value in found["numbers"].items():
            setattr(trainer, name, value)
        self._resumed = torch.frombuffer(bytearray.fromhex(mine["order"]), dtype=torch.uint8)
        _pending(trainer).update(mine["metrics"])
        if losses and hasattr(trainer, "_tr_loss"):  # of which the mean over the processes is logged
            trainer._tr_loss += mine["loss"] if as_many else fmean(losses)
            trainer._initial_global_step = 0  # the mean loss is of all steps


def _pending(trainer: Any) -> Any:
    """What TRL will log the means of, by name."""
    return getattr(trainer, "_metrics", {}).get("train", {})


class NothingLeft(Exception):
    """A training was begun that has no step to make."""


class StopInTime(TrainerCallback):
    """Ends a training with ``NothingLeft`` that has made all of its steps, or that a callback stopped at its begin.

    transformers looks after each step whether another one follows (seen in 5.23): one that is resumed from its last
    checkpoint would make a step too many.

    Args:
        trainer: Of transformers or TRL.
    """

    def __init__(self, trainer: Any) -> None:
        self._ends = hasattr(trainer, "_finalize_training")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step.

        Raises:
            NothingLeft: There is none.
        """
        if self._ends and (control.should_training_stop or 0 < state.max_steps <= state.global_step):
            raise NothingLeft
