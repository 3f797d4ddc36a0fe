"""Scores of responses from reward functions with GRPOTrainer's signature, checked."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.contracts import Origin, RewardError, origin_of
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
        RewardError: The same of a function that a recipe picked, or an exception in it.
    """
    ids = [row[:n].tolist() for row, n in zip(rollout.response_ids, rollout.lengths.tolist(), strict=True)]
    origin = origin_of(function, "reward function")
    with origin.blamed("the call", RewardError):
        result = function(
            prompts=rollout.prompts,
            completions=rollout.completions,
            completion_ids=ids,
            **rollout.columns,
            **extra,
        )
        if inspect.isawaitable(result):
            result = asyncio.run(_wait(result))
        values = result.tolist() if isinstance(result, torch.Tensor) else result
    return _checked(values, origin, rollout.prompts)


async def _wait(result: Any) -> Any:
    return await result


def _checked(values: Any, origin: Origin, prompts: list[Any]) -> torch.Tensor:
    if not isinstance(values, Iterable) or isinstance(values, str):
        what = f"returned {_shown(values)} for {len(prompts)} completions"
        raise origin.error(what, "It must return a list with one number a completion.", RewardError)
    values = list(values)
    if len(values) != len(prompts):
        what = f"returned {len(values)} rewards for {len(prompts)} completions"
        raise origin.error(what, "It must return one number a completion.", RewardError)
    bad = [i for i, value in enumerate(values) if not _is_finite(value)]
    if bad:
        raise origin.error(
            f"returned {_shown(values[bad[0]])} for {len(bad)} of {len(values)} completions; the first belongs to the "
            f"prompt {_shown(prompts[bad[0]])!r}",
            "It must return a finite number for every completion.",
            RewardError,
        )
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # no number, or a tensor of several
        return False


def _shown(value: Any) -> str:
    return str(value)[:200]
