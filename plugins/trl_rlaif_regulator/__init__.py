"""Reward transforms for RL: the distribution regulator and simple ones."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_regulator.regulator import DistributionRegulator
from trl_rlaif_regulator.simple import Clip, Ensemble, LengthPenalty, Whiten

__all__ = ["Clip", "DistributionRegulator", "Ensemble", "LengthPenalty", "Whiten"]


@hookimpl
def register_reward_transforms(register):
    """Register every transform under its name."""
    register("distribution_regulator", DistributionRegulator)
    register("clip", Clip)
    register("whiten", Whiten)
    register("ensemble", Ensemble)
    register("length_penalty", LengthPenalty)
