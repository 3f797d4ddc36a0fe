"""Preference batches with soft labels and categories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference


@dataclass
class SoftPreferenceCollator(DataCollatorForPreference):
    """TRL's collator, which also passes on ``p``, (B,) float32, and ``category``, B entries, where given."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "p" in examples[0]:
            batch["p"] = torch.tensor([e["p"] for e in examples], dtype=torch.float)
        if "category" in examples[0]:
            batch["category"] = [e["category"] for e in examples]
        return batch
