"""Packs preference pairs as rows that hold the shared prefix once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_rlaif.batching import pad_rows, shared_prefix

PREFIX, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3


@dataclass(frozen=True)
class PackedRow:
    """One pair: the shared prefix, the rest of chosen, the rest of rejected.

    Args:
        ids, positions, segments: (S,) each; segments are PREFIX, CHOSEN or REJECTED.
        ends: Indices in the row of the last prompt token, and of the last tokens of chosen and rejected.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    ends: tuple[int, int, int]

    @classmethod
    def of(cls, chosen: list[int], rejected: list[int], prompt_length: int | None = None) -> PackedRow:
        """Pack two sequences of at least one token each.

        Args:
            prompt_length: Tokens of the prompt. None: the whole shared prefix, which may be longer: answers often
                start alike.
        """
        shared = shared_prefix((chosen, rejected))
        # If nothing is shared, not even a start token, the first token of chosen serves as the prompt.
        prompt = max(1, shared if prompt_length is None else min(prompt_length, shared))
        return cls(
            ids=chosen + rejected[shared:],
            positions=[*range(len(chosen)), *range(shared, len(rejected))],
            segments=[PREFIX] * shared + [CHOSEN] * (len(chosen) - shared) + [REJECTED] * (len(rejected) - shared),
            ends=(prompt - 1, len(chosen) - 1, len(chosen) + len(rejected) - shared - 1),
        )


def packed_mask(segments: torch.Tensor) -> torch.Tensor:
    """Causal attention mask: the prefix sees itself, each continuation the prefix and itself.

    Args:
        segments: (B, S) int.

    Returns:
        (B, 1, S, S) bool, True where the row's token sees the column's. Padding sees itself: a softmax over nothing
        is NaN.
    """
    row, column = segments[:, :, None], segments[:, None, :]
    seen = (column == PREFIX) & (row != PADDING) | (column == row)
    return seen.tril()[:, None]


def pack(rows: list[PackedRow], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of packed rows, padded on the right.

    Returns:
        input_ids, position_ids, segments and attention_mask, (B, S) int64 each, and ends, (B, 3) int64.
    """
    ids, mask = pad_rows((row.ids for row in rows), pad_id)
    return {
        "input_ids": ids,
        "position_ids": pad_rows(row.positions for row in rows)[0],
        "segments": pad_rows((row.segments for row in rows), PADDING)[0],
        "attention_mask": mask.long(),
        "ends": torch.tensor([row.ends for row in rows]),
    }


def packed_row_of(example: dict[str, Any]) -> PackedRow:
    """The packed row of a dataset's example: ``chosen_ids``, ``rejected_ids`` and optionally ``prompt_length``."""
    chosen, rejected = list(example["chosen_ids"]), list(example["rejected_ids"])
    return PackedRow.of(chosen, rejected, example.get("prompt_length"))
