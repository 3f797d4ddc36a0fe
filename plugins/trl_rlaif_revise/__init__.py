"""The pair sampler `revise`: the model critiques its own response under a principle, and revises it."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_revise.sampler import Principle, Revise

__all__ = ["Principle", "Revise"]


@hookimpl
def register_pair_samplers(register):
    """Register the sampler under its name."""
    register("revise", Revise)
