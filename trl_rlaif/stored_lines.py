"""Lines of a file, read from disk on demand: a million rows may not fit into memory."""

from __future__ import annotations

import io
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar, overload

from trl_rlaif.files import parse_line

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
_BLOCK = 1 << 20


class Stored(Sequence[T]):
    """Items of a file's complete lines, each read on access. Slicing reads nothing.

    Args:
        path: The file, which must not change meanwhile; a missing one has no lines.
        starts: Byte offsets of its L lines; None: found by reading the file.
        lines: Line numbers, from 0, of the N items; None: all lines.
    """

    def __init__(
        self, path: Path, starts: Sequence[int] | np.ndarray | None = None, lines: Sequence[int] | None = None
    ) -> None:
        self._path, self._file = path, _opened(path)
        self._starts = _line_starts(path) if starts is None else starts
        self._lines = range(len(self._starts)) if lines is None else lines

    @abstractmethod
    def _read(self, line: bytes, where: str) -> T:
        """Parse a line into an item; ``where`` is its file and line number."""

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> T | Self:
        """An item, or the items of a slice."""
        if isinstance(index, slice):
            return type(self)(self._path, self._starts, self._lines[index])
        number = self._lines[index]
        self._file.seek(int(self._starts[number]))
        return self._read(self._file.readline(), f"{self._path}:{number + 1}")

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def at(self, places: np.ndarray) -> Self:
        """The items at the given indices."""
        return type(self)(self._path, self._starts, array("q", map(self._lines.__getitem__, places.tolist())))


class StoredRows(Stored[dict[str, Any]]):
    """The rows of a JSON-lines file written by ``append_lines``."""

    def _read(self, line: bytes, where: str) -> dict[str, Any]:
        """As in ``parse_line``."""
        return parse_line(line, where)


def _line_starts(path: Path) -> np.ndarray:
    """Byte offsets of a file's complete lines."""
    import numpy as np

    ends: list[np.ndarray] = [np.zeros(1, np.int64)]
    read = 0
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + read + 1)
            read += len(block)
    return np.concatenate(ends)[:-1]


def _opened(path: Path) -> BinaryIO:
    return path.open("rb") if path.is_file() else io.BytesIO()
