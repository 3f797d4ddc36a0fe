"""Scores of responses from reward functions with GRPOTrainer's signature, checked."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from trl_rlaif.events import Rollout
    from trl_rlaif.ppo.trainer import PPOTrainer

RewardFunc = Callable[..., Any]


def reward_name(function: RewardFunc) -> str:
    """What the metrics call a reward function."""
    return getattr(function, "__name__", type(function).__name__)


def score_parts(trainer: PPOTrainer, rollout: Rollout) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The raw scores of the reward model and of every function by name, and the former's e(x): (B,) float32 each.

    Raises:
        UserError: As ``call_reward``, or the reward model gave a score that is not finite.
    """
    parts: dict[str, torch.Tensor] = {}
    expected = None
    if trainer.reward_model is not None or (trainer.shared is not None and "reward" in trainer.shared.heads):
        parts["model"], expected = trainer._sampler.scores(trainer.actors, rollout)
    for function in trainer.reward_funcs:
        name = reward_name(function)
        scores = call_reward(function, rollout, trainer_state=trainer.state).to(trainer.accelerator.device)
        parts[name] = parts[name] + scores if name in parts else scores
    if not all(scores.isfinite().all() for scores in parts.values()):
        raise UserError("The reward model gave a score that is not finite.")
    return parts, expected


def call_reward(function: RewardFunc, rollout: Rollout, **extra: Any) -> torch.Tensor:
    """Call ``f(prompts=, completions=, completion_ids=, **columns)`` and check what it returns.

    Returns:
        (B,) float32, finite.

    Raises:
        UserError: Not one number a row, or one that is None, NaN or infinite; function and row are named.
    """
    ids = [row[:n].tolist() for row, n in zip(rollout.response_ids, rollout.lengths.tolist(), strict=True)]
    result = function(
        prompts=rollout.prompts,
        completions=rollout.completions,
        completion_ids=ids,
        **rollout.columns,
        **extra,
    )
    if inspect.isawaitable(result):
        result = asyncio.run(_wait(result))
    values = result.tolist() if isinstance(result, torch.Tensor) else list(result)
    return _checked(values, reward_name(function), rollout.prompts)


async def _wait(result: Any) -> Any:
    return await result


def _checked(values: Sequence[Any], name: str, prompts: list[Any]) -> torch.Tensor:
    if len(values) != len(prompts):
        raise UserError(
            f"The reward function '{name}' returned {len(values)} rewards for {len(prompts)} completions.",
            fix="It must return one number a completion.",
        )
    bad = [i for i, v in enumerate(values) if v is None or not math.isfinite(v)]
    if bad:
        raise UserError(
            f"The reward function '{name}' returned {values[bad[0]]} for {len(bad)} of {len(values)} "
            f"completions; the first belongs to the prompt {str(prompts[bad[0]])[:200]!r}.",
            fix="It must return a finite number for every completion.",
        )
    return torch.tensor(values, dtype=torch.float32)
