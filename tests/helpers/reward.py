"""Settings for small reward-model training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import RewardConfig


def small_config(folder: Path, **options: Any) -> RewardConfig:
    """In float32 on the CPU, with every step logged and nothing saved."""
    settings = {
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return RewardConfig(str(folder), **settings | options)
