"""Scores of responses from reward functions with GRPOTrainer's signature, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.components import numbered
from trl_rlaif.rl.reward_calls import AsyncCall, named_when_it_hangs, wait_for_all
from trl_rlaif.validation import Origin, RewardError, origin_of

if TYPE_CHECKING:
    from trl_rlaif.types import Responses

RewardFunc = Callable[..., Any]
MODEL = "model"


def reward_name(function: RewardFunc) -> str:
    """What the metrics call a reward function."""
    return getattr(function, "__name__", type(function).__name__)


def reward_names(functions: Sequence[RewardFunc], *, model: bool) -> list[str]:
    """What the metrics call all rewards, in the order of ``reward_weights``: the reward model, then the functions."""
    names = [MODEL] if model else []
    for function in functions:
        names.append(numbered(reward_name(function), names))
    return names


def call_rewards(
    functions: Sequence[RewardFunc], responses: Responses, *, timeout: float | None = None, **extra: Any
) -> list[torch.Tensor]:
    """Call ``f(prompts=, completions=, completion_ids=, **columns)`` of every function and check what it returns.

    Coroutine functions start first and run together, in an event loop of their own. Meanwhile the others are called
    in this thread, one after the other; an awaitable that one of them returns joins that loop.

    Args:
        timeout: Seconds that each call may take from its own start; one that takes longer ends the run. Asynchronous
            calls are looked at once the others have returned. None waits for ever.
        extra: Further arguments of every call.

    Returns:
        For each function, in their order, (B,) float32: finite, or NaN where it returned None.

    Raises:
        UserError: Not one number or None for each row, one that is NaN or infinite, or no answer in time; the function
            is named, and the row. Where one blocks the event loop, all that run in it are named.
        RewardError: The same of a function that a recipe picked, or an exception in it.
    """
    ids = [row[:n].tolist() for row, n in zip(responses.response_ids, responses.lengths.tolist(), strict=True)]
    given = {"prompts": responses.prompts, "completions": responses.completions, "completion_ids": ids}
    given |= responses.columns | extra
    origins = [origin_of(function, "reward function") for function in functions]
    results: dict[int, Any] = {}
    calls: dict[int, AsyncCall] = {}
    try:
        for i in sorted(range(len(functions)), key=lambda i: not _is_coroutine_function(functions[i])):
            with origins[i].blamed("the call", RewardError), named_when_it_hangs(origins[i], timeout):
                results[i] = functions[i](**given)
            if inspect.isawaitable(results[i]):
                calls[i] = AsyncCall(origins[i], results[i])
        wait_for_all(list(calls.values()), timeout)
        results |= {i: call.result() for i, call in calls.items()}
    finally:
        for call in calls.values():
            call.cancel()
    return [_checked(results[i], origin, responses.prompts) for i, origin in enumerate(origins)]


def _is_coroutine_function(function: RewardFunc) -> bool:
    """Also of one that a recipe picked, which is wrapped, and of an object with such a ``__call__``."""
    function = inspect.unwrap(function)
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004


def _checked(values: Any, origin: Origin, prompts: list[Any]) -> torch.Tensor:
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if not isinstance(values, Iterable) or isinstance(values, str):
        what = f"returned {_shown(values)} for {len(prompts)} completions"
        raise origin.error(what, "It must return a list with one number or None for each completion.", RewardError)
    given = list(values)
    values = [math.nan if value is None else value for value in given]
    if len(values) != len(prompts):
        what = f"returned {len(values)} rewards for {len(prompts)} completions"
        raise origin.error(what, "It must return one number or None for each completion.", RewardError)
    bad = [i for i, value in enumerate(given) if value is not None and not _is_finite(value)]
    if bad:
        raise origin.error(
            f"returned {_shown(given[bad[0]])} for {len(bad)} of {len(values)} completions; the first belongs to the "
            f"prompt {_shown(prompts[bad[0]])!r}",
            "It must return a finite number for each completion, or None for a completion that it cannot score.",
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
