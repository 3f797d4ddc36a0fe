"""The algorithms of the stage rl: configuration, presets and implementation of each.

Recipes are checked against this table, so importing it imports neither torch nor TRL.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """One value of ``rl.algorithm``.

    Args:
        run: ``module:function`` that trains ``policy/`` according to a context's recipe and returns the results.
        config: Module and class of TRL's own configuration; None if there is only PPOConfig.
        renamed: PPOConfig's keys that have other names there.
        preset: Values of PPOConfig unless the recipe sets them.
        samples: Whether it samples responses; otherwise, it learns from preferences.
        needs_selector: Whether it trains on responses that a selector accepts.
        groups: Whether rewards receive all responses to a prompt together.
    """

    run: str
    config: tuple[str, str] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    samples: bool = True
    needs_selector: bool = False
    groups: bool = False

    def runner(self) -> Callable[[Any], dict[str, Any]]:
        """The training function, imported on call."""
        module, _, function = self.run.partition(":")
        return getattr(importlib.import_module(module), function)

    def config_class(self) -> type:
        """The configuration filled from a recipe's other keys, imported on call."""
        module, name = self.config or ("trl_rlaif.rl.ppo.config", "PPOConfig")
        return getattr(importlib.import_module(module), name)


_PPO, _GROUPS = "trl_rlaif.pipeline.work.ppo:run", "trl_rlaif.pipeline.work.grpo_rloo:run"
# KL coefficient and clip range mean the same in Schulman et al. 2017 and Shao et al. 2024, though TRL's GRPO adds the
# KL to the loss and not to the reward.
_GROUP_KEYS = {
    "kl_coef": "beta",
    "response_length": "max_completion_length",
    "num_ppo_epochs": "num_iterations",
    "cliprange": "epsilon",
}

ALGORITHMS = {
    "ppo": Algorithm(_PPO),
    # REINFORCE with a learned baseline as in Lee et al. 2023: one pass over each batch, whose ratio is 1, returns
    # without discount, and (1 - beta) * reward - beta * KL with beta = 0.05 at sampling temperature 0.9.
    "reinforce": Algorithm(
        _PPO,
        preset={
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "cliprange": math.inf,
            "gamma": 1.0,
            "lam": 1.0,
            "kl_coef": 0.05,
            "kl_weighting": "weighted",
            "temperature": 0.9,
        },
    ),
    "rloo": Algorithm(_GROUPS, ("trl", "RLOOConfig"), _GROUP_KEYS, groups=True),
    "grpo": Algorithm(_GROUPS, ("trl", "GRPOConfig"), _GROUP_KEYS, groups=True),
    # It uses no values.
    "rejection_sampling": Algorithm(
        "trl_rlaif.pipeline.work.ppo:run_rejection", preset={"value": "trunk"}, needs_selector=True
    ),
    # DPO's beta weights the KL to the reference in the same objective that PPO maximizes (Rafailov et al. 2023, eq. 3).
    "dpo": Algorithm("trl_rlaif.pipeline.work.dpo:run", ("trl", "DPOConfig"), {"kl_coef": "beta"}, samples=False),
}
