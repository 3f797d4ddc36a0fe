"""Batching: which sequences share a forward pass, and how they are padded.

Batches depend only on the lengths, so a repeated or resumed run computes the same sequences together, to the last
digit. The longest come first, so memory problems show at once; sequences of equal length keep their order.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Tokens = Sequence[int]


class TokenRows(Sequence[list[int]]):
    """Token lists in four bytes per token; Python's own take 36."""

    def __init__(self) -> None:
        self._tokens, self._ends = array("i"), array("q", [0])

    def append(self, row: Tokens) -> None:
        """Add a row at the end."""
        self._tokens.extend(row)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        row = range(len(self))[index]
        return self._tokens[self._ends[row] : self._ends[row + 1]].tolist()


def length_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of ``size`` of similar length."""
    return _batches(lengths, lambda batch, _: len(batch) < size)


def token_batches(lengths: Sequence[int], budget: int, *, slack: float = 0.0) -> list[list[int]]:
    """Indices in batches of similar length whose padded size is within a token budget.

    Args:
        lengths: Number of tokens of each item.
        budget: Maximum tokens per batch, padding included; a longer item is a batch of its own.
        slack: Minimum length of the shortest item in a batch, as a fraction of the longest one.
    """
    return _batches(lengths, lambda batch, n: n >= slack * batch[0] and (len(batch) + 1) * batch[0] <= budget)


def packed_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches whose lengths add up to at most a token budget; a longer item is a batch of its own."""
    return _batches(lengths, lambda batch, n: sum(batch) + n <= budget)


def _batches(lengths: Sequence[int], fits: Callable[[list[int], int], bool]) -> list[list[int]]:
    """Greedy batches; ``fits`` gets the lengths of the open one and the length of the next item."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and fits([lengths[j] for j in batches[-1]], lengths[i]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def equal_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped by length, shortest first: batches without padding, of any size."""
    return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]


def pad_rows(
    rows: Iterable[Sequence[int] | torch.Tensor], value: int = 0, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of different lengths into one tensor.

    Returns:
        (rows, mask): (B, longest) int64, padded with ``value`` on the right, or on the ``left``, and (B, longest) bool,
        False on padding.
    """
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    side = "left" if left else "right"
    padded = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    kept = [torch.ones(len(row), dtype=torch.bool) for row in tensors]
    return padded, pad_sequence(kept, batch_first=True, padding_side=side)


def shared_prefix(rows: Sequence[Tokens], least: int = 1) -> int:
    """Length of the rows' common prefix, which leaves at least ``least`` tokens of each row."""
    # The lexicographically first and last rows share the shortest prefix.
    first, last = min(rows), max(rows)  # type: ignore[type-var]
    same = sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(first, last, strict=False)))
    return max(0, min(same, min(map(len, rows)) - least))
