"""Settings of reward training: TRL's own."""

from trl import RewardConfig

__all__ = ["RewardConfig"]
