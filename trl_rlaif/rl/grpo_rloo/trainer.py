"""TRL's RLOOTrainer and GRPOTrainer on a shared base, with rehearsal added to their loss."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_rlaif.compat.training_loop import resumable
from trl_rlaif.compat.vllm_engine import engine_for, server_errors
from trl_rlaif.hardware import use_one_gpu
from trl_rlaif.models.safe_training import safe_training
from trl_rlaif.models.sharding import gathered, hand_over
from trl_rlaif.rl.grpo_rloo.config import scoring_settings
from trl_rlaif.rl.grpo_rloo.verification import verify
from trl_rlaif.rl.ppo.checkpoint import part_of_process
from trl_rlaif.run_identity import SameRun, components
from trl_rlaif.states import load_state, save_state
from trl_rlaif.validation import RewardError

if TYPE_CHECKING:
    from trl_rlaif.rl.grpo_rloo.scoring import GroupScorer

_Trainer: Any = object  # the TRL trainer that it is combined with
_STATE = "trl_rlaif.pt"


class RehearsalMixin(_Trainer):
    """Mixin: adds the rehearsal weight times the rehearsal pairs' NLL to each optimizer step (Peng et al. 2023).

    Attributes:
        scorer: Its rewards, selectors and pairs are used; its shared base is this trainer's model.
        same_run: Compares a checkpoint with this run.
        failure: The error that stopped the run, if too many responses had no reward.
    """

    scorer: GroupScorer | None = None
    same_run: SameRun
    failure: RewardError | None = None

    def __init__(self, model: Any, *arguments: Any, **named: Any) -> None:
        uses_vllm = getattr(named.get("args"), "use_vllm", False)
        with engine_for(model.dtype) if uses_vllm else nullcontext():
            super().__init__(model, *arguments, **named)

    def create_accelerator_and_postprocess(self) -> None:
        """TRL's, on one GPU in each process."""
        use_one_gpu(self.args)
        super().create_accelerator_and_postprocess()

    def take(self, scorer: GroupScorer) -> None:
        """Train with this scorer from now on, and on the prompts that its selectors choose."""
        self.scorer = scorer
        settings = components(scorer.rewards, scorer.selection.selectors) | scoring_settings(scorer.args)
        self.same_run = SameRun(self, lambda: scorer.selection.pool.prompts, **settings)
        self.add_callback(ScorerCallback(self))
        self.add_callback(self.same_run)  # after the scorer's, since its checkpoint file gets a digest too

    def verify(self) -> None:
        """Compare TRL's log-probabilities for padded prompts with plain ones: see ``verification.verify``."""

        def logprobs(ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> torch.Tensor:
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, tokens)[0]

        with gathered(self.model):
            verify(self.scorer, logprobs, samples=not getattr(self, "use_vllm", False))

    def train(self, *arguments: Any, **named: Any) -> Any:
        """TRL's.

        Raises:
            RewardError: Too many responses had no reward. A checkpoint has been saved.
            RunError: A gradient is not finite, or vLLM's server does not respond.
        """
        hand_over(self)
        kernels = nullcontext() if self.scorer is None else self.scorer.kernels()
        with safe_training(self), kernels:
            output = resumable(self, partial(super().train, *arguments, **named))
        if self.failure is not None:
            raise self.failure
        return output

    def _generate(self, *arguments: Any, **named: Any) -> Any:
        """TRL's, with a readable error if vLLM's server is gone."""
        with server_errors() if getattr(self, "use_vllm", False) else nullcontext():
            return super()._generate(*arguments, **named)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's, where a completion without a reward has advantage 0; here it has no KL in GRPO's loss either."""
        with gathered(self.model):
            output = super()._generate_and_score_completions(inputs)
        if self.scorer is not None and isinstance(self, GRPOTrainer):
            missing = torch.tensor(self.reward_funcs[0].missing, device=output["completion_mask"].device)
            output["completion_mask"] = output["completion_mask"].masked_fill(missing[:, None], 0)
        return output

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """TRL's, preceded by the rehearsal gradients in the last micro-batch of an optimizer step."""
        # Before it, not after: DDP then averages the gradients accumulated so far over all processes.
        if self.scorer is not None and self.scorer.rehearsal.pairs and self.accelerator.sync_gradients:
            model.train()
            self._metrics["train"]["rehearsal/nll"].append(self.scorer.rehearse().item())
            self._metrics["train"]["time/rehearsal"].append(self.scorer.rehearsal.take_seconds())
        return super().training_step(model, inputs, *arguments, **named)

    def log_alone(self, logs: dict[str, float]) -> None:
        """Log without TRL's own method, which would include the metrics of the step in progress."""
        control = self.control
        due = control.should_log
        Trainer.log(self, logs)
        control.should_log = due  # transformers takes any log for the step's


class RehearsalRLOOTrainer(RehearsalMixin, RLOOTrainer):
    """RLOO (Ahmadian et al. 2024)."""


class RehearsalGRPOTrainer(RehearsalMixin, GRPOTrainer):
    """GRPO (Shao et al. 2024)."""


TRAINERS = {RLOOConfig: RehearsalRLOOTrainer, GRPOConfig: RehearsalGRPOTrainer}


class ScorerCallback(TrainerCallback):
    """Keeps the scorer in sync with the trainer: its progress, its state in checkpoints, new selections."""

    def __init__(self, trainer: RehearsalMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify the model and share the trainer's state with the scorer; on resume, restore the transforms' state."""
        self.trainer.verify()
        scorer = self.trainer.scorer
        scorer.state = state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = kept_state(folder)
        if kept is not None:
            mine = part_of_process(kept["processes"], scorer.accelerator)
            scorer.rewards.load_state_dict(mine)
            scorer.rehearsal.load_state_dict(mine)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop with a checkpoint if too many responses had no reward.

        Select rehearsal pairs again when due; TRL's dataloader keeps its prompts.
        """
        scorer = self.trainer.scorer
        self.trainer.failure = scorer.rewards.unscored.error()
        if self.trainer.failure is not None:
            scorer.rewards.unscored.forget()
            control.should_save = control.should_training_stop = True
            return
        if state.global_step < state.max_steps and scorer.selection.due(state.global_step):
            training = self.trainer.model.training
            with gathered(self.trainer.model):
                before, chosen = scorer.selection.chosen, scorer.selection.choose(state.global_step)
            scorer.selection.take(replace(chosen, rows=before.rows, strata=before.strata))
            self.trainer.model.train(training)  # TRL tells its next log from an evaluation's by this

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Notify the observing plugins."""
        if logs and "reward" in logs:
            self.trainer.scorer.plugins.notify("policy_updated", trainer=self.trainer, metrics=logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the selection, and each process's transform state and position in the pairs, to TRL's checkpoint."""
        scorer, folder = self.trainer.scorer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        parts = gather_object([scorer.rewards.state_dict() | scorer.rehearsal.state_dict()])
        if state.is_world_process_zero and folder.is_dir():
            chosen = scorer.selection.chosen
            chosen = None if chosen is None else chosen.to_dict()
            save_state({"chosen": chosen, "processes": parts}, folder / _STATE)


def kept_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Our entries in TRL's checkpoint: ``chosen``, and ``processes``, one part each; or None."""
    path = Path(checkpoint) / _STATE
    return load_state(path) if path.exists() else None
