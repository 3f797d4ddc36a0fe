"""What the stages have in common that train with one of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.models.safe_training import safe_training
from trl_rlaif.run_identity import SameRun

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context


def train_from_last(context: Context, trainer: Any, stage: str, title: str) -> Any:
    """Train from the newest checkpoint, if it is of the same run; what TRL's trainer returns."""
    callback = context.callback(stage, title)
    callback.attach(trainer)
    trainer.add_callback(SameRun(trainer))
    try:
        with safe_training(trainer):
            return trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    finally:
        callback.close()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a TRL trainer, or None."""
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
