"""TRL's RLOOTrainer and GRPOTrainer on a shared base, rehearsing beside their own loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from trl_rlaif.ppo.selection import choose
from trl_rlaif.trl_version import check_trl

check_trl()
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402 - only a TRL that is known to work

if TYPE_CHECKING:
    from trl_rlaif.ppo.trainer import PPOTrainer

_STATE = "trl_rlaif.pt"


class Rehearsing:
    """Mixin: gamma * NLL of the scorer's rehearsal pairs joins each optimizer step (Peng et al. 2023).

    Attributes:
        scorer: Whose rewards, selectors and pairs are used; its shared base is this trainer's model.
    """

    scorer: PPOTrainer | None = None

    def take(self, scorer: PPOTrainer) -> None:
        """Train with this scorer from here on, and on the prompts that its selectors choose."""
        self.scorer = scorer
        self.add_callback(ScorerCallback(self))

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """TRL's, and before the last micro-batch of an optimizer step the gradients of what is rehearsed."""
        # Before, not behind it: DDP averages what has gathered by then over all processes.
        if self.scorer is not None and self.scorer.rehearsal.pairs and self.accelerator.sync_gradients:
            model.train()
            self._metrics["train"]["rehearsal/nll"].append(self.scorer.rehearse().item())
            self._metrics["train"]["time/rehearsal"].append(self.scorer._rehearsal_seconds)
            self.scorer._rehearsal_seconds = 0.0
        return super().training_step(model, inputs, *arguments, **named)


class RehearsingRLOOTrainer(Rehearsing, RLOOTrainer):
    """RLOO (Ahmadian et al. 2024)."""


class RehearsingGRPOTrainer(Rehearsing, GRPOTrainer):
    """GRPO (Shao et al. 2024)."""


TRAINERS = {"rloo": (RehearsingRLOOTrainer, RLOOConfig), "grpo": (RehearsingGRPOTrainer, GRPOConfig)}


class ScorerCallback(TrainerCallback):
    """Keeps the scorer in step with the trainer: its place in the run, its state in checkpoints, new selections."""

    def __init__(self, trainer: Rehearsing) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The scorer counts as the trainer does; a resumed run takes up the transforms' state."""
        scorer = self.trainer.scorer
        scorer.state, scorer.args.num_total_batches = state, state.max_steps
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
        if state.global_step and path.exists():
            found = torch.load(path, weights_only=True)
            for transform, kept in zip(scorer.reward_transforms, found["transforms"], strict=True):
                transform.load_state_dict(kept)
            scorer.rehearsal.load_state_dict(found["rehearsal"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose anew what is rehearsed, where the configuration says so."""
        scorer, every = self.trainer.scorer, self.trainer.scorer.args.selection_every
        if every and scorer.data_selectors and state.global_step < state.max_steps and state.global_step % every == 0:
            scorer.apply(choose(scorer))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Tell the plugins that watch."""
        if logs and "reward" in logs:
            self.trainer.scorer.plugins.notify("policy_updated", trainer=self.trainer, metrics=logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The transforms' state and the place in the pairs, beside TRL's own checkpoint."""
        scorer, folder = self.trainer.scorer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            states = [transform.state_dict() for transform in scorer.reward_transforms]
            torch.save({"transforms": states, "rehearsal": scorer.rehearsal.state_dict()}, folder / _STATE)


class Tracked:
    """A group trainer as the tracker of forgetting wants one: the trainer's loop, the scorer's models."""

    def __init__(self, trainer: Rehearsing) -> None:
        self._trainer = trainer

    @property
    def actors(self) -> Any:
        """Who plays policy and reference."""
        return self._trainer.scorer.actors

    @property
    def shared(self) -> Any:
        """The base of all roles."""
        return self._trainer.scorer.shared

    def log(self, logs: dict[str, float]) -> None:
        """Without TRL's own log, which would take the numbers of the step that is under way along."""
        control = self._trainer.control
        due = control.should_log
        Trainer.log(self._trainer, logs)
        control.should_log = due  # transformers takes any log for the step's own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)
