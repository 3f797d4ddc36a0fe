"""Writes a trainer's logs to the run's folder and shows its steps on the progress bar."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.progress import progress_bar

# The trainers' own summaries of a run or an evaluation, which are not steps.
_SUMMARIES = ("train_runtime", "eval_runtime")


class StageCallback(TrainerCallback):
    """Writes every logged step to metrics.jsonl and shows the progress of training."""

    def __init__(self, folder: RunFolder, stage: str, description: str) -> None:
        self._folder, self._stage, self._description = folder, stage, description
        self._stack = ExitStack()
        self._advance: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run computes these steps again; without a checkpoint, also the metrics from before the first step.
        self._folder.drop_metrics(self._stage, after=state.global_step or -1)
        bar = progress_bar(self._description, state.max_steps, state.global_step, "steps")
        self._advance = self._stack.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._advance is not None:
            self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if numbers and not any(name in numbers for name in _SUMMARIES):
            self._folder.add_metrics(self._stage, state.global_step, numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar, also after an error in training."""
        self._stack.close()
        self._advance = None

    def attach(self, trainer: Any) -> None:
        """Replace a trainer's own printing with this callback."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
