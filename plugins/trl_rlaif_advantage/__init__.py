"""The reward transform `advantage`: scores a response relative to the expected reward of its prompt."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_advantage.transform import AdvantageModel

__all__ = ["AdvantageModel"]


@hookimpl
def register_reward_transforms(register):
    """Register the transform under its name."""
    register("advantage", AdvantageModel)
