"""Shared code of the stages that train with one of TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif import content, run_identity
from trl_rlaif.compat.training_loop import resumable
from trl_rlaif.distributed import is_first
from trl_rlaif.errors import TrlRlaifError, UserError
from trl_rlaif.models.safe_training import safe_training
from trl_rlaif.progress import say
from trl_rlaif.run_identity import SameRun

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe import Recipe


@contextmanager
def settings_of(recipe: Recipe, section: str) -> Iterator[None]:
    """Convert errors in a section's settings: TRL and transformers raise all kinds of exceptions if settings conflict,
    or do not suit the model or the machine.

    Raises:
        UserError: With their message and the section's line.
    """
    import torch

    place = recipe.line((section,))
    try:
        yield
    except UserError as error:
        if type(error) is not UserError:
            raise
        raise UserError.from_problems([replace(p, where=p.where or place) for p in error.problems]) from error
    except (TrlRlaifError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # a system error, such as a full disk
            raise
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        what = (
            f"The settings of section '{section}' contradict each other, or do not work with this model or machine: "
            f"{said}"
        )
        raise UserError(what, where=place) from error


def train_from_last(context: Context, trainer: Any, stage: str, title: str) -> Any:
    """Train from the newest checkpoint, if it belongs to the same run; returns the output of TRL's trainer.

    Raises:
        UserError: The trainer dropped every row.
    """
    if not len(trainer.train_dataset):
        raise UserError(
            f"The stage '{stage}' has no row left to train on: its trainer dropped all rows, as too long or without "
            "a token to learn.",
            where=context.recipe.line((stage,)),
            fix="Raise max_length, or check the rows.",
        )
    callback = context.callback(stage, title)
    callback.attach(trainer)
    trainer.add_callback(SameRun(trainer))
    try:
        last = last_checkpoint(trainer.args.output_dir)
        with safe_training(trainer):
            return resumable(trainer, partial(trainer.train, resume_from_checkpoint=last))
    finally:
        callback.close()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete and unchanged checkpoint of a TRL trainer, or None; prints a line on each newer one.

    A kill may leave a partial one: transformers writes it under its final name.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        damaged = content.damaged(path)
        if damaged is None:
            return str(path)
        # SameRun writes the latter file after all others, and then the digests.
        if not (path / content.FILE).exists() and (path / run_identity.FILE).exists():
            say(f"Warning: {path} has no digests, after a kill or from an earlier version; it is used as it is.")
            if is_first():
                content.record(path)
            return str(path)
        what = "is not whole" if damaged.name == content.FILE else f"is damaged ({damaged.relative_to(path)})"
        say(f"Warning: {path} {what}. The run continues from the previous one, if any.")
    return None
