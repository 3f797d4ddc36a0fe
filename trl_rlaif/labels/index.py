"""An on-disk index of labels.jsonl: derived from the file, and rebuilt from it if necessary."""

from __future__ import annotations

import io
import sqlite3
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trl_rlaif.errors import RunError

_BLOCK = 1 << 20
_TABLES = """
CREATE TABLE IF NOT EXISTS labels (
    setup TEXT, pair TEXT, place INTEGER, judged INTEGER, PRIMARY KEY (setup, pair)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS covered (bytes INTEGER, lines INTEGER, broken INTEGER, checksum INTEGER);
"""


class Covered(NamedTuple):
    """The beginning of labels.jsonl that the index covers.

    Args:
        bytes, lines: Its size.
        broken: Number of damaged lines in it.
        checksum: Its CRC-32.
    """

    bytes: int = 0
    lines: int = 0
    broken: int = 0
    checksum: int = 0


class LabelIndex:
    """An SQLite table with the byte offset of every label's last line, and whether it has a probability.

    Args:
        path: The table's file. It is emptied if damaged, or if the covered part of labels.jsonl has changed. None:
            keep the table in memory.
        labels: The labels.jsonl to index.
    """

    def __init__(self, path: Path | None, labels: Path) -> None:
        self._path = path
        try:
            self._open()
        except sqlite3.OperationalError:  # a full disk, say
            raise
        except sqlite3.DatabaseError:
            self._remove()
            self._open()
        if self.covered.checksum != _checksum(labels, self.covered.bytes):
            self._tables.executescript("DELETE FROM labels; DELETE FROM covered;")
            self.covered = Covered()

    def _open(self) -> None:
        self._tables = sqlite3.connect(self._path or ":memory:")
        self._tables.executescript(_TABLES)
        found = self._tables.execute("SELECT * FROM covered").fetchone()
        self.covered = Covered(*found) if found else Covered()

    def _remove(self) -> None:
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def find(self, setup: str, pair: str) -> tuple[int, bool] | None:
        """A label's offset, and whether it has a probability; None if there is no label.

        Raises:
            RunError: As ``damaged``.
        """
        try:
            found = self._tables.execute(
                "SELECT place, judged FROM labels WHERE setup = ? AND pair = ?", (setup, pair)
            ).fetchone()
        except sqlite3.DatabaseError as error:
            raise self.damaged(str(error)) from error
        return found and (found[0], bool(found[1]))

    def add(self, rows: Iterable[tuple[str, str, int, bool]], covered: Covered) -> None:
        """Add the lines after the covered part; they are durable after ``commit``.

        Args:
            rows: Setup, pair, offset, and whether there is a probability.
            covered: The part covered with them.
        """
        self._tables.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", rows)
        self.covered = covered

    def commit(self) -> None:
        """Commit additions to disk. Those lost by a kill are read from labels.jsonl again."""
        self._tables.execute("DELETE FROM covered")
        self._tables.execute("INSERT INTO covered VALUES (?, ?, ?, ?)", self.covered)
        self._tables.commit()

    def close(self) -> None:
        """Close without committing."""
        self._tables.close()

    def damaged(self, what: str) -> RunError:
        """The error to raise if the index has a wrong offset. Removes the index."""
        self._remove()
        fix = "It was removed; --resume rebuilds it from the labels, none of which is lost."
        return RunError(f"The index of the labels is damaged: {what}.", where=str(self._path or ""), fix=fix)


def _checksum(path: Path, size: int) -> int | None:
    """CRC-32 of the first bytes of a file; None if it is shorter. A missing file has no bytes."""
    found = 0
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        while size and (block := file.read(min(size, _BLOCK))):
            found, size = zlib.crc32(block, found), size - len(block)
    return None if size else found
