"""All hooks that plugins can implement, and their pluggy markers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    import torch

    from trl_rlaif.rl.ppo.trainer import PPOTrainer
    from trl_rlaif.types import Responses, Rollout

hookspec = HookspecMarker("trl_rlaif")
hookimpl = HookimplMarker("trl_rlaif")


@hookspec
def register_labelers(register: Callable[[str, type], None]) -> None:
    """Call ``register(name, cls)`` for each Labeler of the plugin."""


@hookspec
def register_reward_transforms(register: Callable[[str, type], None]) -> None:
    """Call ``register(name, cls)`` for each RewardTransform of the plugin."""


@hookspec
def register_data_selectors(register: Callable[[str, type], None]) -> None:
    """Call ``register(name, cls)`` for each DataSelector of the plugin."""


@hookspec
def register_pair_samplers(register: Callable[[str, type], None]) -> None:
    """Call ``register(name, cls)`` for each PairSampler of the plugin."""


@hookspec
def rollout_collected(trainer: Any, rollout: Responses) -> None:
    """Observe a batch of responses before scoring; in PPO it is a Rollout with log-probabilities and values."""


@hookspec
def rewards_computed(trainer: PPOTrainer, rollout: Rollout, rewards: torch.Tensor) -> None:
    """Observe the per-token rewards of a rollout, shape (batch, response), before advantages are computed."""


@hookspec
def policy_updated(trainer: PPOTrainer, metrics: dict[str, Any]) -> None:
    """Observe the metrics of an update after its optimizer steps."""
