"""Scoring, selection and rehearsal for TRL's group trainers, on the same base that they train."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerState

from trl_rlaif.models.forward import as_responses
from trl_rlaif.models.kernels import training_kernels
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.plugins import Plugins
from trl_rlaif.responses import ResponseReader
from trl_rlaif.rl.generation import RolloutGenerator
from trl_rlaif.rl.metrics import score_metrics
from trl_rlaif.rl.ppo.config import PPOConfig
from trl_rlaif.rl.ppo.update_step import PPOStep
from trl_rlaif.rl.rehearsal import Rehearsal
from trl_rlaif.rl.scoring import RewardPipeline, Scores
from trl_rlaif.rl.selection import PromptSelection
from trl_rlaif.types import RehearsalPair, Responses, Rollout

# Arguments that TRL passes to reward functions besides the dataset's columns.
_TRAINERS_OWN = ("trainer_state", "log_extra", "log_metric", "environments")


@dataclass
class GroupScorer:
    """The collaborators of a group trainer; the sample, score and transform steps of its selectors' pools.

    Args:
        args: PPO's settings, of which those for sampling, scoring, selection and rehearsal are read.
        shared: The base that TRL's trainer trains.
        reader: Of responses.
        generator: Samples the pools' responses.
        state: The trainer's, once it trains.
    """

    args: PPOConfig
    accelerator: Accelerator
    shared: SharedBase
    role_models: RoleModels
    reader: ResponseReader
    generator: RolloutGenerator
    rewards: RewardPipeline
    rehearsal: Rehearsal
    plugins: Plugins
    state: TrainerState
    selection: PromptSelection | None = None

    def kernels(self) -> AbstractContextManager:
        """``training_kernels`` of the base."""
        return training_kernels(self.shared.peft, bf16=self.args.bf16)

    def sample(self, batch: dict[str, Any]) -> Rollout:
        """Responses to a batch of prompts, with log-probabilities."""
        self.shared.peft.eval()
        return self.generator.draw(self.role_models, batch)

    def score(self, responses: Responses) -> Scores:
        """Their summed rewards."""
        return self.rewards.score(responses, trainer_state=self.state)

    def transform(self, scores: Scores, rollout: Rollout, *, pool: bool = False) -> Scores:
        """Transformed scores."""
        return self.rewards.transform(scores, rollout, rollout.kl(), pool=pool)

    def rehearse(self) -> torch.Tensor:
        """Add the gradients of a batch of pairs to an optimizer step; returns its NLL, nats per token."""
        generator, progress = self.generator, self.state.global_step / self.state.max_steps
        step = PPOStep(self.role_models, self.accelerator, self.args, generator.temperature, generator.pads)
        return self.rehearsal.step(step.rehearse, progress, self.accelerator.device)


class GroupReward:
    """All rewards of a run as one function for TRL's trainers: summed, transformed, and logged under PPO's names.

    Attributes:
        scorer: To be set before the first call.
        missing: For each completion of the last call, whether it has no reward.
    """

    __name__ = "score"

    def __init__(self) -> None:
        self.scorer: GroupScorer | None = None
        self.missing: list[bool] = []

    @torch.no_grad()
    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """One finite number for each completion, or None if it has no reward: TRL leaves it out of the baseline.

        Raises:
            UserError: As ``RewardPipeline.score``.
        """
        scorer, rewards, policy = self.scorer, self.scorer.rewards, self.scorer.shared.peft
        own = {name: columns.pop(name) for name in _TRAINERS_OWN if name in columns}
        training = policy.training
        policy.eval()  # dropout of the adapters would make scores and KL noisy
        responses = self._responses(prompts, completion_ids, columns)
        kl = torch.full(responses.lengths.shape, torch.nan, device=scorer.accelerator.device)
        if rewards.needs_kl:  # zeros would look like a KL of 0
            kl = scorer.generator.kl(scorer.role_models, responses)
        scorer.plugins.notify("rollout_collected", trainer=scorer, rollout=responses)
        scores = scorer.score(responses)
        rewards.observe(scores)
        scores = rewards.transform(scores, responses, kl)
        policy.train(training)  # TRL tells training from evaluation by this
        metrics = score_metrics(responses, scores.total, scorer.accelerator.gather)
        for name, value in (metrics | rewards.take_metrics(scores)).items():
            own["log_metric"](name, value)
        self.missing = (~scores.scored).tolist()
        found = zip(scores.total.tolist(), self.missing, strict=True)
        return [None if missing else score for score, missing in found]

    def _responses(self, prompts: list[Any], completion_ids: Sequence[list[int]], columns: dict[str, Any]) -> Responses:
        prompt_ids, read = columns.pop("input_ids"), self.scorer.reader.read
        found = [read(ids, prompt) for ids, prompt in zip(completion_ids, prompt_ids, strict=True)]
        pairs = [
            RehearsalPair(prompt, response.as_completion(prompt), None, None, "", [*of_prompt], [*ids])
            for prompt, response, of_prompt, ids in zip(prompts, found, prompt_ids, completion_ids, strict=True)
        ]
        ended = [response.ended for response in found]
        return replace(as_responses(pairs, self.scorer.accelerator.device, ended), columns=columns)
