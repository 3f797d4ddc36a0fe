"""The reward transform `advantage`: a reward model that scores what is earned over what is expected for the prompt."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_advantage.transform import AdvantageModel

__all__ = ["AdvantageModel"]


@hookimpl
def register_reward_transforms(register):
    """Register the transform under its name."""
    register("advantage", AdvantageModel)
