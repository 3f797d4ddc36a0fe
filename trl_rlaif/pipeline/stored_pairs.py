"""The pairs of pairs.jsonl, which stay on the disk: a million of them is more text than memory may hold."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from trl_rlaif.data import Pair
from trl_rlaif.files import parse_line
from trl_rlaif.pipeline.rows import PairRow

_BLOCK = 1 << 24


class StoredPairs(Sequence[Pair]):
    """Pairs in the order of their file, each read when it is asked for. A slice reads nothing.

    Args:
        path: pairs.jsonl, which is not changed meanwhile; a missing one has no pairs.
        starts: Where its lines begin, in bytes, (L,) int64; None looks for them.
        lines: Which of its lines the pairs are, (N,) int64; None: all.
    """

    def __init__(self, path: Path, starts: np.ndarray | None = None, lines: np.ndarray | None = None) -> None:
        self._path = path
        self._starts = _line_starts(path) if starts is None else starts
        self._lines = np.arange(len(self._starts)) if lines is None else lines
        self._file = path.open("rb") if path.exists() else None

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> StoredPairs: ...

    def __getitem__(self, index: int | slice) -> Pair | StoredPairs:
        """A pair.

        Raises:
            UserError: Its line is damaged.
        """
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        number = int(self._lines[index])
        self._file.seek(self._starts[number])
        row = parse_line(self._file.readline(), f"{self._path}:{number + 1}")
        known = PairRow.__annotations__
        return Pair(**{k: row.get(k) for k in known}, extra={k: v for k, v in row.items() if k not in known})

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def at(self, places: np.ndarray) -> StoredPairs:
        """Some of these pairs."""
        return StoredPairs(self._path, self._starts, self._lines[places])


def _line_starts(path: Path) -> np.ndarray:
    """Of the whole lines of a file."""
    ends: list[np.ndarray] = [np.zeros(1, np.int64)]
    read = 0
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + read + 1)
            read += len(block)
    return np.concatenate(ends)[:-1]
