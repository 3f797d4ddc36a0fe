"""From a recipe's section ``rl``, written for PPO, to the configuration of TRL's group trainers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.sections import STOPPING_LIMITS
from trl_rlaif.rl.ppo.config import PPOConfig

# Settings for scoring, selection and rehearsal outside TRL's trainer.
_ELSEWHERE = {
    "total_episodes", "max_prompt_length", "stop_token", "stop_token_id", "stop_tokens", "score_at_end",
    "missing_eos_penalty", "reward_normalization", "max_failed", "reward_timeout", "whiten_scores", "score_clip",
    "length_penalty", "selection_prompts", "selection_every", "rehearsal_coef", "rehearsal_schedule",
    "rehearsal_batch_size",
}  # fmt: skip
# Those that determine which scores and prompts a trainer learns from. The run's length is TRL's max_steps.
_SCORING = sorted(_ELSEWHERE - {"total_episodes", *STOPPING_LIMITS} | {"reward_weights"})
MOST_GENERATIONS = 8


def scoring_settings(args: PPOConfig) -> dict[str, Any]:
    """A scorer's settings that TRL's configuration lacks, by ``rl.name``: TRL's ``reward_weights`` is different."""
    return {f"rl.{name}": getattr(args, name) for name in _SCORING}


def group_arguments(
    written: Mapping[str, Any], config_class: type, renamed: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a GRPOConfig or RLOOConfig, and the unused keys.

    Args:
        written: The recipe's keys: PPOConfig's or the class's own, which take precedence.
        config_class: TRL's.
        renamed: PPOConfig's keys that have other names in TRL.

    Raises:
        UserError: The responses of an optimizer step cannot be divided into groups.
    """
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    own = {key: value for key, value in written.items() if key in known}
    for ours, theirs in renamed.items():
        if ours in written and theirs in known:
            own.setdefault(theirs, written[ours])
    # The documented default of kl_coef holds for every algorithm with a KL to the reference; GRPOConfig's own is 0.
    own.setdefault("beta", PPOConfig.kl_coef)
    batch = _responses_a_step(own)
    own.setdefault("num_generations", _generations(batch))
    if "total_episodes" in written and "max_steps" not in own:
        # One step per batch of new responses, for each time that it is used.
        own["max_steps"] = math.ceil(written["total_episodes"] / batch) * own.get("num_iterations", 1)
    unused = sorted(set(written) - set(own) - set(renamed) - _ELSEWHERE)
    return own, unused


def _responses_a_step(own: Mapping[str, Any]) -> int:
    return own.get("per_device_train_batch_size", 8) * own.get("gradient_accumulation_steps", 1)


def _generations(batch: int) -> int:
    """Default responses per prompt: as many as fit, up to TRL's own default."""
    fitting = [size for size in range(2, MOST_GENERATIONS + 1) if batch % size == 0]
    if not fitting:
        raise UserError(
            f"{batch} responses an optimizer step cannot be divided into groups of 2 to {MOST_GENERATIONS}.",
            fix="Change per_device_train_batch_size or gradient_accumulation_steps, or set num_generations.",
        )
    return fitting[-1]
