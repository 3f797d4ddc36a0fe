"""Settings of the PPO loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_rlaif.ppo.trl_base import TrlPPOConfig


@dataclass
class PPOConfig(TrlPPOConfig):
    """TRL's PPOConfig with what the loop here adds; every added field is off by default.

    Args:
        max_prompt_length: Longest prompt in tokens; a longer one is left out, counted and reported.
            None takes what the model's context leaves beside ``response_length``.
    """

    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens; longer ones are left out, counted and reported."},
    )
