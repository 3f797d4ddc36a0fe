"""PPOTrainer: TRL's constructor, saving and callbacks around a training loop in short, overridable steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from trl_rlaif import run_identity
from trl_rlaif.compat.trl_ppo import BasePPOTrainer
from trl_rlaif.components import DataSelector, RewardTransform
from trl_rlaif.errors import UserError
from trl_rlaif.hardware import use_one_gpu
from trl_rlaif.models import sharding
from trl_rlaif.models.kernels import training_kernels
from trl_rlaif.models.role_models import RoleModels, SeparateRoleModels, SharedRoleModels
from trl_rlaif.models.safe_training import safe_training
from trl_rlaif.models.shared_model import SharedBase, save_adapter
from trl_rlaif.plugins import Plugins, installed_plugins
from trl_rlaif.rl import deepspeed
from trl_rlaif.rl.generation import RolloutGenerator
from trl_rlaif.rl.log_completions import CompletionLog
from trl_rlaif.rl.metrics import update_metrics
from trl_rlaif.rl.ppo import advantages as adv
from trl_rlaif.rl.ppo.checkpoint import Checkpoints
from trl_rlaif.rl.ppo.config import PPOConfig, with_defaults
from trl_rlaif.rl.ppo.construction import longest_row, policy_of, prompt_loader, reader_of, shared_base, tokenized
from trl_rlaif.rl.ppo.loop import Loop
from trl_rlaif.rl.ppo.update_step import Divisors, MicroBatch, PPOStep, PPOUpdate
from trl_rlaif.rl.prompts import BatchStream, PromptCollator
from trl_rlaif.rl.rehearsal import Rehearsal, given_pairs
from trl_rlaif.rl.reward_functions import RewardFunc
from trl_rlaif.rl.reward_shaping import AdaptiveKLController, kl_per_token, token_rewards
from trl_rlaif.rl.scoring import RewardPipeline, Scores
from trl_rlaif.rl.selection import PromptPool, PromptSelection
from trl_rlaif.types import RehearsalPair, Rollout

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PPOTrainer(BasePPOTrainer):
    """Drop-in for the ``PPOTrainer`` that TRL had until 1.12, with pluggable rewards and one base for every role.

    With ``score_at_end=False`` and ``loss_reduction="micro_batch"`` it reproduces that trainer's numbers with any
    release of TRL, except for two bugs that it fixes: minibatches are shuffled with ``args.seed``, so that runs are
    reproducible; and with ``num_mini_batches`` > 1 there is an optimizer step for every minibatch, and statistics are
    averaged over the actual number of minibatches.

    Args:
        args: PPOConfig (or TRL's own, in releases that have one).
        processing_class: The tokenizer; None loads it from ``model``'s path.
        model: Causal language model, PeftModel or path; or a SharedBase with its roles.
        ref_model: A separate reference model; None: the initial policy (see SharedBase).
        reward_model: A separate sequence classification model, or the folder of a reward adapter, which
            becomes a role of the shared base. None if ``reward_funcs`` provide all rewards.
        train_dataset: ``prompt`` as text or messages, or ``input_ids``; other columns are passed to the functions.
        value_model: A separate sequence classification model. None: an adapter with a scalar head on the policy's
            frozen base.
        data_collator, eval_dataset, optimizers, callbacks: As in TRL's trainer.
        peft_config: LoRA configuration of the policy. Default without ``value_model``: rank 16 on all linear layers.
        reward_funcs: Functions with GRPOTrainer's signature, ``f(prompts, completions, **columns) ->
            list[float]``, added to the reward model's score with weights ``args.reward_weights``. None instead of a
            number means that the function has no reward for that row.
        reward_transforms: Transforms of the summed scores, in this order.
        data_selectors: Select the prompts to train on and the pairs to rehearse, from scored responses of the initial
            policy.
        rehearsal_dataset: The user's own pairs to rehearse: ``prompt`` and ``completion``, as text or messages.
        plugins: Plugins whose observing hooks are called; None: all installed plugins.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase | None,
        model: PreTrainedModel | PeftModel | SharedBase | str,
        ref_model: PreTrainedModel | None = None,
        reward_model: nn.Module | str | Path | None = None,
        train_dataset: Dataset | None = None,
        value_model: nn.Module | None = None,
        data_collator: Any = None,
        eval_dataset: Dataset | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[Any] | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        reward_transforms: Sequence[RewardTransform] = (),
        data_selectors: Sequence[DataSelector] = (),
        rehearsal_dataset: Dataset | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        args, self.plugins = use_one_gpu(with_defaults(args)), plugins or installed_plugins()
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        model, processing_class = policy_of(model, processing_class, args)
        trunk = args.value == "trunk"
        shared = shared_base(model, value_model, ref_model, peft_config, trunk=trunk)
        if shared is not None:
            if isinstance(reward_model, str | Path):
                shared.add_reward(reward_model)
                reward_model = None
            model, value_model, peft_config = shared.peft, shared.add_value(trunk=trunk), None
        has_reward = reward_model is not None or (shared is not None and "reward" in shared.heads)
        if not has_reward and not functions:
            raise UserError("There is no reward: pass reward_model or reward_funcs.")
        pairs = given_pairs(rehearsal_dataset, processing_class, max_length=longest_row(model, args))
        self.reader = reader_of(args, processing_class, model)
        configured = model.generation_config.eos_token_id
        super().__init__(
            args,
            processing_class,
            model,
            ref_model,
            deepspeed.NoRewardModel() if reward_model is None else reward_model,
            tokenized(train_dataset, processing_class, model, args),
            value_model,
            data_collator or PromptCollator(processing_class),
            eval_dataset if eval_dataset is None else tokenized(eval_dataset, processing_class, model, args),
            optimizers,
            callbacks,
            peft_config,
        )
        # TRL's trainer sets its own stop token here, which would be saved with the policy.
        self.policy_model.generation_config.eos_token_id = configured
        self.reward_model = reward_model
        self.shared = shared
        self._set_up_models()
        scored = (lambda responses: self.generator.scores(self.role_models, responses)) if has_reward else None
        self.rewards = RewardPipeline(functions, reward_transforms, scored, args, self.reader, self.accelerator)
        self._set_up_loop(data_selectors, pairs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL's trainer, except where DeepSpeed or FSDP require otherwise."""
        if self.args.generation == "vllm" and sharding.enabled(self.accelerator):
            raise UserError("Generation by vLLM does not run with FSDP.", fix="Start it with DDP.")
        sharding.share_out(self.model, self.accelerator)
        super().create_optimizer(*args, **kwargs)
        deepspeed.tell(self.accelerator, self.optimizer)
        return self.optimizer

    def _set_up_models(self) -> None:
        args, shared = self.args, self.shared
        if shared is not None:
            (shared.heads if sharding.is_shared_out(shared.peft) else shared).to(self.accelerator.device)
        deepspeed.take_back_models(self)
        self.generator = RolloutGenerator(args, self.accelerator, self.reader)
        for model in (self.ref_model, self.reward_model):
            if model is not None:
                model.eval()
        if args.gradient_checkpointing:
            for model in [self.policy_model] if self.shared is not None else [self.policy_model, self.value_model]:
                model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})

    def _set_up_loop(self, selectors: Sequence[DataSelector], given: Sequence[RehearsalPair]) -> None:
        """The collaborators of the loop, and their parts of its checkpoints."""
        args, accelerator = self.args, self.accelerator
        self.batches = BatchStream(self.dataloader)
        self.rehearsal = Rehearsal(given, args, self.local_seed)
        policy = lambda: self.role_models.model("policy")  # noqa: E731 - of which accelerate may make another object
        pool = PromptPool(self.train_dataset, self.data_collator, self, self.rewards, policy, args, accelerator)
        self.selection = PromptSelection(selectors, pool, self.rehearsal, args.output_dir, self._train_on)
        self.kl_controller = AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon, args.kl_weighting)
        self.optimization = PPOUpdate(args, accelerator, self.model, self.optimizer, self.local_seed)
        self.checkpoints = Checkpoints(
            args,
            accelerator,
            self.state,
            self.model,
            self.optimizer,
            self.lr_scheduler,
            common=[self.selection, self.kl_controller],
            own=[self.rehearsal, self.batches, self.optimization],
            rewards=self.rewards,
            save_model=partial(self.save_model, _internal_call=True),
            identity=cache(self._identity),
        )
        self.loop = Loop(self, self.checkpoints, self.plugins)

    def _train_on(self, prompts: Dataset, strata: Sequence[Any] | None) -> None:
        """Draw batches from these prompts from now on."""
        self.train_dataset = prompts
        loader = prompt_loader(prompts, self.local_dataloader_batch_size, self.data_collator, strata)
        self.dataloader = self.accelerator.prepare(loader)
        self.batches.restart(self.dataloader)

    def _identity(self) -> dict[str, Any]:
        components = run_identity.components(self.rewards, self.selection.selectors)
        prompts, processes = self.selection.pool.prompts, self.accelerator.num_processes
        return run_identity.identity(self.args, prompts, processes, **components)

    @property
    def role_models(self) -> RoleModels:
        """The models in the roles of policy, value, reward and reference."""
        if self.shared is not None:
            return SharedRoleModels(self.shared, self.reward_model)
        model = self.accelerator.unwrap_model(self.model)
        reference = self.ref_adapter_name if self.ref_model is None else None
        return SeparateRoleModels(model.policy, self.ref_model, model.value_model, self.reward_model, reference)

    # ---- The loop -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> None:
        """Run all updates.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest complete one in
                ``args.output_dir`` (if there is none, training starts from scratch).

        Raises:
            UserError: The checkpoint belongs to a run with other settings or prompts. Or a reward function returned
                something other than a finite number or None for each completion, or more than a fraction
                ``args.max_failed`` of the responses has no reward; a checkpoint is saved first.
            RunError: A gradient is not finite (``check_gradients``).
        """
        kernels = training_kernels(*self.role_models.trained(), bf16=self.args.bf16)
        with safe_training(self), kernels, sharding.gathered(self.model):
            self.begin(resume_from_checkpoint)
            while self.loop.continues:
                with self.checkpoints.kept():
                    self.selection.renew(self.state.global_step)
                began = time.monotonic()
                with self.checkpoints.kept():
                    rollout, scores = self.collect()
                rewards = self.compute_rewards(rollout, scores)
                self.plugins.notify("rewards_computed", trainer=self, rollout=rollout, rewards=rewards)
                advantages, returns = self.compute_advantages(rollout, rewards)
                stats = self.update(rollout, advantages, returns)
                metrics = self.compute_metrics(rollout, scores, stats)
                self.kl_controller.observe(metrics["objective/kl"], self.args.batch_size)
                metrics["time/update"] = time.monotonic() - began
                self._end_update(metrics)
            self.loop.end()

    def begin(self, resume_from_checkpoint: str | Path | bool | None) -> None:
        """Start before the first update, or resume after those of a checkpoint."""
        self.loop.begin(self.args.num_total_batches, resume_from_checkpoint)
        if self.rehearsal.given and not self.selection.selectors:
            self.selection.write()

    def collect(self) -> tuple[Rollout, torch.Tensor]:
        """Sample the next batch of prompts and score it.

        Returns:
            The rollout, with ``scored`` False where a response has no reward and with its scoring metrics; and (B,)
            float32 scores, 0 where a response has none.
        """
        rollout = self.sample(next(self.batches))
        self.plugins.notify("rollout_collected", trainer=self, rollout=rollout)
        scores = Scores.of(self.score(rollout))
        self.rewards.observe(scores)
        self.rewards.unscored.check()
        scores = Scores.of(self.transform(scores, rollout))
        rollout = replace(rollout, scored=scores.scored, metrics=self.rewards.take_metrics(scores))
        return rollout, scores.total.masked_fill(~scores.scored, 0)

    def sample(self, batch: dict[str, Any]) -> Rollout:
        """Responses to a batch of prompts, with log-probabilities and values."""
        self.model.eval()
        return self.generator.draw(self.role_models, batch)

    def score(self, rollout: Rollout) -> Scores | torch.Tensor:
        """The weighted sum of all rewards; an override may return (B,) float32, NaN where a response has none."""
        return self.rewards.score(rollout, trainer_state=self.state)

    def transform(
        self, scores: Scores | torch.Tensor, rollout: Rollout, *, pool: bool = False
    ) -> Scores | torch.Tensor:
        """Transformed scores: see ``RewardPipeline.transform``."""
        return self.rewards.transform(Scores.of(scores), rollout, rollout.kl(), pool=pool)

    def compute_rewards(self, rollout: Rollout, scores: torch.Tensor) -> torch.Tensor:
        """Per-token rewards, (B, T) float32: the KL penalty on every token, the score at the end."""
        kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, self.args.kl_estimator)
        controller = self.kl_controller
        rewards = token_rewards(kl, controller.score_weight * scores, rollout.lengths, controller.coef)
        if self.args.whiten_rewards:
            rewards = adv.masked_whiten(rewards, rollout.learned()[1], shift_mean=False, total=self.accelerator.reduce)
        return rewards

    def compute_advantages(self, rollout: Rollout, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whitened advantages, zero for responses without a reward, and returns: (B, T) float32 each."""
        advantages, returns = adv.gae(rewards, rollout.values, self.args.gamma, self.args.lam)
        return adv.masked_whiten(advantages, rollout.learned()[0], total=self.accelerator.reduce), returns

    def update(
        self, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor
    ) -> dict[str, list[torch.Tensor]]:
        """All epochs and minibatches of one update; returns statistics by name, as in ``PPOUpdate.run``."""
        self.model.train()
        micro_step = partial(self.micro_step, rollout, advantages, returns)
        rehearse = self.rehearse if self.rehearsal.pairs else None
        with sharding.released(self.model):
            stats = self.optimization.run(rollout, micro_step, rehearse, self.state.global_step + 1)
        stats["val/explained_variance"] = [adv.explained_variance(rollout.values, returns, rollout.learned()[1])]
        return stats

    def micro_step(
        self,
        rollout: Rollout,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        rows: torch.Tensor,
        divisors: Divisors,
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of one micro-batch; returns its statistics."""
        return self._objective.backward(MicroBatch(rollout, advantages, returns, rows, divisors))

    def rehearse(self) -> torch.Tensor:
        """Add the gradients of a rehearsal batch to an optimizer step; returns its NLL, nats per token."""
        return self.rehearsal.step(self._objective.rehearse, self._progress, self.accelerator.device)

    @property
    def _progress(self) -> float:
        """Fraction of all updates completed."""
        return self.state.global_step / self.args.num_total_batches

    @property
    def _objective(self) -> PPOStep:
        return PPOStep(self.role_models, self.accelerator, self.args, self.generator.temperature, self.generator.pads)

    def compute_metrics(
        self, rollout: Rollout, scores: torch.Tensor, stats: dict[str, list[torch.Tensor]]
    ) -> dict[str, float]:
        """The metrics of one update: those of TRL's trainer under its names, and the rollout's own."""
        controller = self.kl_controller
        weights = controller.score_weight, controller.coef
        metrics = update_metrics(rollout, scores, stats, weights, self.args.kl_estimator, self.accelerator.gather)
        ends = torch.isin(rollout.response_ids, rollout.response_ids.new_tensor(self.reader.end_ids)).sum()
        metrics |= {
            "objective/kl_coef": controller.coef,
            "policy/epochs": int(metrics.get("policy/epochs", self.args.num_ppo_epochs)),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "episode": self.state.episode + self.args.batch_size,
            "val/num_eos_tokens": self.accelerator.reduce(ends, "sum").item(),
        }
        return metrics | self.rehearsal.metrics(self._progress) | rollout.metrics

    def _end_update(self, metrics: dict[str, float]) -> None:
        size = self.args.batch_size
        episode = self.state.episode + size
        metrics["eps"] = int(episode / self.loop.seconds)
        self.loop.count(metrics, episodes=size, epoch=episode / self.train_dataset_len)
        self.lr_scheduler.step()
        self.loop.tell("on_step_end")
        # Before a checkpoint is written: sampling advances the random generators.
        if self.eval_dataset is not None and self.completion_log.due(self.state.global_step):
            with self.checkpoints.kept(repeated=False):
                self.generate_completions(sampling=True)
        if self.control.should_save:
            self.loop.save()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy; if it is an adapter, the adapter alone, which PEFT can load onto the base."""
        if self.shared is None:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_adapter(self.shared.peft, "policy", folder)
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:  # as in transformers' Trainer
            self.push_to_hub(commit_message="Model save")

    def generate_completions(self, sampling: bool = False) -> None:
        """Print prompts of ``eval_dataset`` with near-greedy responses and their scores.

        Args:
            sampling: Only the first batch, as for ``num_sample_generations`` during a run.
        """
        if self.eval_dataset is not None:
            self.completion_log.show(self.state.global_step, first_batch=sampling)

    @property
    def completion_log(self) -> CompletionLog:
        """The completions for ``eval_dataset``."""
        return CompletionLog(
            self.eval_dataset, self.data_collator, self, self.generator, self.rewards, self.args, self.accelerator
        )
