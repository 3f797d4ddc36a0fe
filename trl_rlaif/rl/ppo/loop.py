"""The frame around a run's updates: trainer state, callbacks, plugins, logs and checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_rlaif.compat.trl_ppo import BasePPOTrainer
    from trl_rlaif.plugins import Plugins
    from trl_rlaif.rl.ppo.checkpoint import Checkpoints


class Loop:
    """Starts, counts and ends the updates of a trainer with its own training loop.

    Args:
        trainer: Its state, callbacks and log are used.
        checkpoints: Of its run.
        plugins: Their hook ``policy_updated`` is called.
    """

    def __init__(self, trainer: BasePPOTrainer, checkpoints: Checkpoints, plugins: Plugins) -> None:
        self.trainer, self.checkpoints, self.plugins = trainer, checkpoints, plugins
        self.args, self.state = trainer.args, trainer.state
        self._started = 0.0

    def begin(self, updates: int, resume_from_checkpoint: str | Path | bool | None) -> None:
        """Start before the first update, or resume after those of a checkpoint.

        Args:
            updates: Of the whole run.
            resume_from_checkpoint: As in ``PPOTrainer.train``.
        """
        self._started = time.monotonic()
        state = self.state
        state.global_step = state.episode = 0
        state.max_steps, state.num_train_epochs = updates, self.args.total_episodes / self.trainer.train_dataset_len
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self.args, name)
            if value is not None:  # below 1, a fraction of all updates
                setattr(state, name, -int(-updates * value // 1) if value < 1 else value)
        self.checkpoints.resume(resume_from_checkpoint)
        self.tell("on_train_begin")

    @property
    def continues(self) -> bool:
        """Whether there is another update."""
        return self.state.global_step < self.state.max_steps and not self.trainer.control.should_training_stop

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    def count(self, metrics: dict[str, Any], *, episodes: int, epoch: float) -> None:
        """Count an update, and pass its metrics to plugins and logs.

        Args:
            episodes: Responses that it sampled.
            epoch: Passes over the prompts by then.
        """
        self.state.global_step += 1
        self.state.episode += episodes
        self.state.epoch = epoch
        self.plugins.notify("policy_updated", trainer=self.trainer, metrics=metrics)
        self.trainer.log(metrics)

    def tell(self, event: str) -> None:
        """Call the callbacks' method of this name."""
        trainer = self.trainer
        trainer.control = getattr(trainer.callback_handler, event)(self.args, self.state, trainer.control)

    def save(self) -> None:
        """Write a checkpoint."""
        self.checkpoints.save()
        self.tell("on_save")

    def end(self) -> None:
        """After the last update."""
        self.tell("on_train_end")
        self.trainer.model.eval()
