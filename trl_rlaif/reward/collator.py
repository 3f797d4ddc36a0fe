"""Preference batches with soft labels and categories, padded or packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_rlaif.reward.packing import pack, packed_row_of


@dataclass
class SoftPreferenceCollator(DataCollatorForPreference):
    """TRL's collator, with what soft labels and transforms read beside the tokens.

    Args:
        packed: A pair is one row in which what both responses begin with stands once (see ``packing``); else two
            rows, and ``prompt_end``, (B,) int64, is the index of the last prompt token in both.

    Returns:
        Also ``p``, (B,) float32, ``category``, B entries, and ``chosen_log_ratios`` and ``rejected_log_ratios``,
        (B, K) float32, where given.
    """

    packed: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [packed_row_of(example) for example in examples]
        if self.packed:
            batch = pack(rows, self.pad_token_id)
            if "margin" in examples[0]:
                batch["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float)
        else:
            batch = super().torch_call(examples)
            batch["prompt_end"] = torch.tensor([row.ends[0] for row in rows])
        for name in ("p", "chosen_log_ratios", "rejected_log_ratios"):
            if name in examples[0]:
                batch[name] = torch.tensor([e[name] for e in examples], dtype=torch.float)
        if "category" in examples[0]:
            batch["category"] = [e["category"] for e in examples]
        return batch
