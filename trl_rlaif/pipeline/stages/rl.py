"""Reinforcement learning, by the recipe's algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_rlaif.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context


def run(context: Context) -> dict[str, Any]:
    """Train ``policy/``; return the first and last numbers of the run itself."""
    return ALGORITHMS[context.recipe.rl.algorithm].runner()(context)
