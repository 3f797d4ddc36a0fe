"""Preference batches with soft labels and categories, padded or packed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl import extract_prompt
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_rlaif.batching import shared_prefix
from trl_rlaif.reward.packing import pack, packed_row_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_end(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The prompt length of a row tokenized by TRL, up to the start of the assistant's turn, as in PPO.

    Args:
        row: TRL's preference format with ``chosen_ids`` and ``rejected_ids``. The prompt is its ``prompt``, or the
            messages that ``chosen`` and ``rejected`` share at the start.

    Returns:
        ``prompt_length``, in tokens; nothing for texts without a ``prompt``, or if the row already has it.
    """
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("chosen"), list):
        prompt = extract_prompt(row)["prompt"]
    if not prompt or row.get("prompt_length") is not None:
        return {}
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=prompt[-1]["role"] != "assistant", tokenize=True, return_dict=True,
            **_template_arguments(row),
        )["input_ids"]  # fmt: skip
    # After the shared prefix, tokens have merged across the prompt's end.
    return {"prompt_length": min(shared_prefix((ids, row[side]), least=0) for side in ("chosen_ids", "rejected_ids"))}


def _template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """Those of TRL's trainers."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (row.get("chat_template_kwargs") or {})


@dataclass
class SoftPreferenceCollator(DataCollatorForPreference):
    """TRL's collator, with the additional columns of soft labels and transforms.

    Args:
        packed: A pair is one row that holds the shared prefix once (see ``packing``); else two rows, and
            ``prompt_end``, (B,) int64, is the index of the last prompt token in both.

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
