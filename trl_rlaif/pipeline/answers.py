"""Prompts of the evaluated sets and rewards of the policy's answers, for the stage evaluate and tracking during RL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trl_rlaif.batching import token_batches
from trl_rlaif.distributed import divided
from trl_rlaif.evaluation.forgetting import answer_pair
from trl_rlaif.generation import padded_together
from trl_rlaif.models import forward
from trl_rlaif.models.forward import RolloutSlice, as_responses
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.rl.rollouts import scored_rows

if TYPE_CHECKING:
    from trl_rlaif.models.shared_model import SharedBase
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe import Recipe

BATCH_TOKENS = 8192


def sources(recipe: Recipe) -> dict[str, str]:
    """The source of each set's prompts, by set name."""
    return recipe.evaluate.sets or {"test": recipe.data.eval_prompts}


@torch.no_grad()
def rewards_of(context: Context, shared: SharedBase, prompts: list[list[int]], encoded: list[list[int]]) -> list[float]:
    """Scores of the reward role for responses as sampled, read at the end of turn if ``score_at_end``, as in PPO."""
    pairs = [answer_pair("", "", *row) for row in zip(prompts, encoded, strict=True)]
    role_models, reader = SharedRoleModels(shared), context.reader(shared.model)
    scores = [0.0] * len(pairs)
    batches = token_batches([len(p.prompt_ids) + len(p.response_ids) for p in pairs], BATCH_TOKENS)

    def score(batch: list[int]) -> list[float]:
        responses = as_responses([pairs[i] for i in batch], shared.model.device)
        if context.recipe.rl.config.get("score_at_end", True):
            responses = scored_rows(responses, reader)
        return forward.scores(role_models, RolloutSlice.of(responses, torch.arange(len(batch))))[:, 0].tolist()

    together = [
        [whole[i] for i in group]
        for whole in batches
        for group in padded_together(shared.model, [len(pairs[i].prompt_ids) for i in whole])
    ]
    for batch, found in divided(together, score):
        for i, one in zip(batch, found, strict=True):
            scores[i] = one
    return scores
