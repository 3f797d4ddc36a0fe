"""Rejection sampling (RAFT, ReST): the policy is fine-tuned on those of its responses that the selectors accept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import set_seed
from transformers import PrinterCallback

from trl_rlaif.compat.trl_version import check_trl
from trl_rlaif.errors import UserError
from trl_rlaif.generation import derived_seed
from trl_rlaif.hardware import use_one_gpu
from trl_rlaif.models import sharding
from trl_rlaif.models.kernels import training_kernels
from trl_rlaif.models.safe_training import safe_training
from trl_rlaif.rl import deepspeed
from trl_rlaif.rl.selection import MergedSelection, PromptSelection
from trl_rlaif.types import Pool, RehearsalPair

check_trl()
from trl import SFTConfig, SFTTrainer  # noqa: E402 - only a TRL that is known to work

if TYPE_CHECKING:
    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.rl.ppo.config import PPOConfig
    from trl_rlaif.rl.ppo.loop import Loop
    from trl_rlaif.rl.ppo.trainer import PPOTrainer


class RejectionTrainer:
    """Samples and scores responses, has the selectors accept some, fine-tunes the policy on them, and repeats.

    D_n = {(x, y) : accepted, y ~ pi_n}, and pi_n+1 is pi_n after supervised training on D_n (RAFT, Dong et al. 2023;
    ReST, Gulcehre et al. 2023). Each iteration has its own optimizer and learning rate schedule, makes
    ``num_ppo_epochs`` passes over the accepted pairs, and ends with a checkpoint, unless ``save_strategy`` is ``no``.
    The user's own rehearsal pairs are trained on in every iteration.

    Logged for each iteration: under PPO's names ``objective/scores``, ``objective/kl``, ``objective/entropy``,
    ``rollout/length``, ``rollout/ended`` and ``reward/<category>``, means over all sampled responses with a reward;
    ``rollout/unscored``, the fraction of responses without one;
    ``rejection/accepted``, the fraction accepted, ``rejection/threshold`` and ``rejection/score``, the lowest and the
    mean score of the accepted; and ``loss/sft``, nats per response token.

    Args:
        selection: The selectors, and the prompt pool that they choose from, with its settings: those that
            fine-tuning shares with PPO apply here too.
        shared: The base, whose policy is trained.
        loop: Counts the iterations.
        iterations: Number of iterations, at least 1; see ``count_iterations``.

    Raises:
        UserError: There is no selector or no shared base, or the run was started with DeepSpeed or FSDP.
    """

    def __init__(self, selection: PromptSelection, shared: SharedBase | None, loop: Loop, iterations: int) -> None:
        if not selection.selectors:
            raise UserError("Rejection sampling needs a data selector that accepts responses.")
        if shared is None:
            raise UserError("Rejection sampling needs one base for every role.", fix="Leave out value_model.")
        for name, engine in (("DeepSpeed", deepspeed), ("FSDP", sharding)):
            if engine.enabled(selection.pool.accelerator):
                raise UserError(f"Rejection sampling does not run with {name}.", fix="Start it with DDP.")
        if iterations < 1:
            raise UserError(f"iterations is {iterations}; it must be 1 or more.")
        self.selection, self.shared, self.loop, self.iterations = selection, shared, loop, iterations
        self.args, self.accelerator = selection.pool.args, selection.pool.accelerator
        self.rewards = selection.pool.rewards
        self._unscored = 0

    @classmethod
    def of(cls, trainer: PPOTrainer, iterations: int) -> RejectionTrainer:
        """With the prompts, rewards, selectors, logs and checkpoints of a PPOTrainer, whose value model is not used."""
        return cls(trainer.selection, trainer.shared, trainer.loop, iterations)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> None:
        """Run all iterations.

        Args:
            resume_from_checkpoint: As in ``PPOTrainer.train``. The results are those of an uninterrupted run.

        Raises:
            UserError: Nothing was accepted, or a reward function returned something other than a finite number per
                completion. A checkpoint is saved first.
        """
        with training_kernels(self.shared.peft, bf16=self.args.bf16):
            self.loop.begin(self.iterations, resume_from_checkpoint)
            while self.loop.continues:
                began = time.monotonic()
                pool, chosen = self.select()
                self.selection.take(chosen)
                metrics = self.metrics(pool, chosen)
                metrics["loss/sft"] = self.fine_tune(self.selection.rehearsal.pairs)
                metrics["time/update"] = time.monotonic() - began
                self._end_iteration(pool, metrics)
            self.loop.end()

    def select(self) -> tuple[Pool, MergedSelection]:
        """Responses of the current policy, sampled with a seed of this iteration, and the accepted ones."""
        step, counted = self.loop.state.global_step, self.rewards.unscored.total
        with self.loop.checkpoints.kept():
            set_seed(derived_seed(self._seed, self.accelerator.process_index))
            pool = self.selection.pool.draw(self.selection.num_responses, selection=step)
            chosen = self.selection.choose_from(pool)
            if not accepted(chosen):
                raise UserError(
                    f"Nothing was accepted in iteration {step + 1}: of {len(pool)} responses the best has a score of "
                    f"{pool.scores.max().item():.4g}.",
                    fix="Lower the selector's threshold, or raise its num_responses.",
                )
        self._unscored = self.rewards.unscored.total - counted
        return pool, chosen

    def fine_tune(self, pairs: Sequence[RehearsalPair]) -> float:
        """Train the policy's adapter on pairs with TRL's SFTTrainer; the mean loss, nats per response token."""
        shared = self.shared
        with _roles_kept(shared), shared.role("policy"):
            # TRL casts trainable weights on a 4-bit base to bfloat16; the policy keeps PPO's dtype.
            shared.peft.requires_grad_(False)
            with _silent_datasets():
                sft = SFTTrainer(
                    model=shared.peft,
                    args=sft_config(self.args, derived_seed(self._seed)),
                    train_dataset=as_dataset(pairs),
                    processing_class=self.rewards.reader.tokenizer,
                )
            for name, parameter in shared.peft.named_parameters():
                parameter.requires_grad_(".policy." in name)
            sft.remove_callback(PrinterCallback)
            with safe_training(sft):
                loss = torch.tensor([sft.train().training_loss], device=self.accelerator.device)
        return self.accelerator.gather(loss).mean().item()

    def metrics(self, pool: Pool, chosen: MergedSelection) -> dict[str, float]:
        """The numbers of one iteration before it fine-tunes."""
        scores: list[Any] = [pair.score for pair in accepted(chosen)]  # accepted pairs have one
        lengths = [len(ids) for ids in pool.response_ids]
        read, rows = self.rewards.reader.read, zip(pool.response_ids, pool.prompt_ids, strict=True)
        ended = [read(ids, prompt).ended for ids, prompt in rows]
        metrics = {
            "objective/scores": pool.scores.mean().item(),
            "objective/kl": pool.kl.mean().item(),
            "objective/entropy": sum(e * n for e, n in zip(pool.entropies.tolist(), lengths, strict=True)) / len(pool),
            "rollout/length": sum(lengths) / len(pool),
            "rollout/ended": sum(ended) / len(pool),
            "rollout/unscored": self._unscored / (len(pool) + self._unscored),
            "rollout/distinct": len(set(map(tuple, pool.response_ids))),
            "rejection/accepted": len(scores) / len(pool),
            "rejection/threshold": min(scores),
            "rejection/score": sum(scores) / len(scores),
            "episode": self.loop.state.episode + len(pool) + self._unscored,
        }
        metrics |= self.rewards.sum.take_metrics()
        for category in sorted({c for c in pool.categories if c is not None}):
            rows = [i for i, c in enumerate(pool.categories) if c == category]
            metrics[f"reward/{category}"] = pool.scores[rows].mean().item()
        for transform in self.rewards.transforms:
            metrics |= transform.metrics()
        return metrics

    @property
    def _seed(self) -> str:
        return f"rejection sampling, {self.args.seed}, {self.loop.state.global_step}"

    def _end_iteration(self, pool: Pool, metrics: dict[str, float]) -> None:
        passes = (self.loop.state.global_step + 1) * len(set(pool.rows.tolist())) / len(self.selection.pool.prompts)
        self.loop.count(metrics, episodes=len(pool) + self._unscored, epoch=passes)
        self.loop.tell("on_step_end")
        if self.args.save_strategy != "no":
            self.loop.save()


def count_iterations(selection: PromptSelection, total_episodes: int | None = None) -> int:
    """How many iterations sample this many responses in total; at least 1.

    Args:
        selection: Its prompts, selectors and settings determine how many responses an iteration samples.
        total_episodes: None: ``num_train_epochs`` passes over the prompts. (The settings always hold a number,
            PPO's.)
    """
    args, every = selection.pool.args, len(selection.pool.prompts)
    prompts = min(args.selection_prompts or every, every)
    passes = args.num_train_epochs * every if total_episodes is None else total_episodes / selection.num_responses
    return max(1, math.ceil(round(passes / prompts, 6)))


def accepted(chosen: MergedSelection) -> list[RehearsalPair]:
    """The chosen pairs that can be trained on: those with a response and a score."""
    return [pair for pair in chosen.rehearsal if pair.response_ids and pair.score is not None]


def as_dataset(pairs: Sequence[RehearsalPair]) -> datasets.Dataset:
    """Pairs in SFTTrainer's tokenized format: ``input_ids``, and a ``completion_mask`` that is 1 on the response."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[*pair.prompt_ids, *pair.response_ids] for pair in pairs],
            "completion_mask": [[0] * len(pair.prompt_ids) + [1] * len(pair.response_ids) for pair in pairs],
        }
    )


def sft_config(args: PPOConfig, seed: int) -> SFTConfig:
    """The settings that fine-tuning shares with PPO: learning rate, its schedule, batch, optimizer, precision.

    Logs, checkpoints and gradient checkpointing are left to the enclosing PPOTrainer.
    """
    known = [field.name for field in fields(SFTConfig) if field.init]
    carried = {name: getattr(args, name) for name in known if hasattr(args, name)}
    checkpointing = {name: False for name in carried if name in ("gradient_checkpointing", "activation_checkpointing")}
    own = {
        "num_train_epochs": args.num_ppo_epochs,
        "max_steps": -1,
        "seed": seed,
        "data_seed": None,
        "max_length": None,  # as long as they were sampled
        "completion_only_loss": True,
        "report_to": "none",
        "logging_strategy": "no",
        "logging_first_step": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    return use_one_gpu(SFTConfig(**carried | checkpointing | own))


@contextmanager
def _roles_kept(shared: SharedBase) -> Iterator[None]:
    """Undo a transformers trainer's changes to a shared base, except for the trained weights."""
    learning = [(parameter, parameter.requires_grad) for parameter in shared.peft.parameters()]
    use_cache = shared.model.config.use_cache
    # TRL replaces the forward method with one that computes the loss, accelerate with one under autocast.
    methods = ("forward", "_original_forward")
    modules = [
        (module, {name: module.__dict__[name] for name in methods if name in module.__dict__})
        for module in (shared.peft, shared.model)
    ]
    try:
        yield
    finally:
        for module, before in modules:
            for name in methods:
                module.__dict__.pop(name, None)
            module.__dict__.update(before)
        shared.model.config.use_cache = use_cache
        for parameter, required in learning:
            parameter.requires_grad_(required)
            parameter.grad = None
        shared.eval()


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """No progress bars for a few rows, several in every iteration."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
