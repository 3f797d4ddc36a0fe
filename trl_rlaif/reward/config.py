"""Settings of reward training: TRL's own, except for one default."""

from __future__ import annotations

from dataclasses import dataclass

import trl

from trl_rlaif.hardware import settle_bf16


@dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's RewardConfig; by default, ``bf16`` is on only if the machine computes bfloat16 fast."""

    def __post_init__(self) -> None:
        settle_bf16(self)
        super().__post_init__()
