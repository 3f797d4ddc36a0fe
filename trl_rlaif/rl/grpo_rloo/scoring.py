"""All rewards of a run as one reward function for TRL's trainers: summed, transformed, and logged by PPO's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.rl.metrics import score_metrics
from trl_rlaif.rl.rehearsal import as_rollout
from trl_rlaif.types import RehearsalPair, Rollout

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.trainer import PPOTrainer

# What TRL hands to reward functions beside the dataset's columns.
_TRAINERS_OWN = ("trainer_state", "log_extra", "log_metric", "environments")


class GroupScore:
    """What PPO would score, with GRPOTrainer's signature.

    Attributes:
        scorer: Whose reward model, functions and transforms score; to be set before the first call.
        missing: Of each completion of the last call, whether it has no reward.
    """

    __name__ = "score"

    def __init__(self) -> None:
        self.scorer: PPOTrainer | None = None
        self.missing: list[bool] = []

    @torch.no_grad()
    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """One finite number for each completion, or None where it has no reward: TRL leaves it out of the baseline.

        Raises:
            UserError: As ``PPOTrainer.score``.
        """
        scorer, policy = self.scorer, self.scorer.shared.peft
        own = {name: columns.pop(name) for name in _TRAINERS_OWN if name in columns}
        training = policy.training
        policy.eval()  # dropout of the adapters would make scores and KL noisy
        rollout = self._rollout(prompts, completion_ids, columns)
        scorer.plugins.notify("rollout_collected", trainer=scorer, rollout=rollout)
        scores = scorer.rewards.score(rollout, trainer_state=scorer.state)
        scorer.rewards.observe(scores)
        scores = scorer.rewards.transform(scores, rollout, rollout.kl())
        policy.train(training)  # by which TRL tells training from evaluation
        metrics = score_metrics(rollout, scores.total, scorer.accelerator.gather)
        for name, value in (metrics | scorer.rewards.take_metrics(scores)).items():
            own["log_metric"](name, value)
        self.missing = scores.total.isnan().tolist()
        found = zip(scores.total.tolist(), self.missing, strict=True)
        return [None if missing else score for score, missing in found]

    def _rollout(self, prompts: list[Any], completion_ids: Sequence[list[int]], columns: dict[str, Any]) -> Rollout:
        prompt_ids, read = columns.pop("input_ids"), self.scorer.reader.read
        responses = [read(ids, prompt) for ids, prompt in zip(completion_ids, prompt_ids, strict=True)]
        pairs = [
            RehearsalPair(prompt, response.as_completion(prompt), None, None, "", [*of_prompt], [*ids])
            for prompt, response, of_prompt, ids in zip(prompts, responses, prompt_ids, completion_ids, strict=True)
        ]
        rollout = as_rollout(pairs, self.scorer.accelerator.device, [response.ended for response in responses])
        rollout = replace(rollout, columns=columns)
        if self.scorer.rewards.needs_kl:
            return self.scorer._generator.compared(self.scorer.role_models, rollout)
        # Zeros would look like a KL of 0.
        unknown = torch.full_like(rollout.logprobs, torch.nan)
        return replace(rollout, logprobs=unknown, ref_logprobs=unknown)
