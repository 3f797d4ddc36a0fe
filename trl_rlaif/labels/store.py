"""labels.jsonl: an append-only store of labels, keyed by everything that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from trl_rlaif.data import Pair
from trl_rlaif.distributed import is_first, wait
from trl_rlaif.encoding import as_messages
from trl_rlaif.errors import UserError
from trl_rlaif.files import append_lines, read_lines, sync, to_json, unsealed, write_state
from trl_rlaif.labels.index import Covered, LabelIndex
from trl_rlaif.pipeline.rows import LabelRow
from trl_rlaif.progress import say
from trl_rlaif.types import Label

# A pair's key in an array: ``LabelKey.of`` as ASCII.
KEY = "S16"
# Lines that the index adds and commits together.
_AT_ONCE = 10_000
# Interval at which labels are synced to disk.
SYNC_SECONDS = 1.0
# Fields of a label that are probabilities, or lists of them.
_SHARES = ("p", "p_12", "p_21", "mass_12", "mass_21")
_RATINGS = ("ratings_1", "ratings_2")
# Number of damaged lines that get their own warning.
_NAMED = 5
# Fields that most labelers leave empty; written only if they are not.
_OPTIONAL = (
    "skipped", "score_1", "score_2", "spread_1", "spread_2", *_RATINGS, "bound_12", "bound_21", "voted", "criteria",
)  # fmt: skip


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def pair_key(pair: Pair, columns: Collection[str] = ()) -> str:
    """The part of a pair that determines its label: its texts and some columns, but not its id."""
    also = [{name: pair.extra.get(name) for name in columns}] if columns else []
    turns = [(m["role"], m["content"]) for m in as_messages(pair.prompt)]
    return _digest(turns, pair.response_1, pair.response_2, *also)


@dataclass(frozen=True)
class LabelKey:
    """Everything that determines a label besides the pair.

    Args:
        labeler: Name of the labeler.
        options: Its options.
        judge: Name of the judge.
        judge_revision: Version of its weights and tokenizer, their dtype and quantization, and the variables and date
            given to its chat template.
        prompt_revision: Changes with any file of the judge's prompt.
        columns: Other columns of the data that it depends on; determined by the rest.
    """

    labeler: str
    options: dict[str, Any]
    judge: str
    judge_revision: str
    prompt_revision: str
    columns: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits."""
        # Without criteria, the same as before that option existed.
        options = {name: value for name, value in self.options.items() if (name, value) != ("criteria", {})}
        parts = asdict(self) | {"options": options}
        return _digest({name: value for name, value in parts.items() if name != "columns"})

    def of(self, pair: Pair) -> str:
        """The pair's part of the key: 16 hexadecimal digits."""
        return pair_key(pair, self.columns)


class LabelStore:
    """The labels of a folder, for any number of label keys; read from disk on demand.

    A line is a label with its keys, ``setup`` (LabelKey.key) and ``pair``. Lines are only ever appended; of those with
    the same keys, the last one counts. Files of several machines are merged by concatenation.

    Args:
        path: labels.jsonl. A partial last line left by a power cut is removed; a damaged line elsewhere, such as
            between two concatenated files, is skipped with a warning and counted in ``broken``.
        index: A file with each label's offset, so that only the uncovered part is read on opening. It is built from
            labels.jsonl, and rebuilt if it does not match. None: keep the index in memory; with a file, the store is a
            context manager.

    Raises:
        UserError: A probability is outside [0, 1].
    """

    def __init__(self, path: Path, index: Path | None = None) -> None:
        self.path, self._named, self._uncommitted, self._synced = path, 0, 0, 0.0
        self._file: BinaryIO | None = None
        self._index = LabelIndex(index if is_first() else None, path)  # the other processes have their own
        self._read_on()
        self._index.commit()
        if self._named > _NAMED:
            say(f"Warning: {path}: {self._named - _NAMED} more lines are damaged.")
        if is_first() and path.exists() and path.stat().st_size > self._index.covered.bytes:
            with path.open("r+b") as file:
                file.truncate(self._index.covered.bytes)

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *error: object) -> None:
        """Release the index, which only one store can write to. Uncommitted entries are read again later."""
        self._index.close()
        if is_first() and self._synced > 0:
            sync(self.path)

    @property
    def broken(self) -> int:
        """Number of damaged lines."""
        return self._index.covered.broken

    def get(self, setup: str, pair: str) -> LabelRow | None:
        """A label by ``LabelKey.key`` and its pair's ``LabelKey.of``; None if there is none.

        Raises:
            RunError: It is not at the offset in the index.
        """
        self._read_on()
        found = self._index.find(setup, pair)
        if found is None:
            return None
        self._file.seek(found[0])
        try:
            row = cast(LabelRow, unsealed(json.loads(self._file.readline())))
        except ValueError as error:
            raise self._index.damaged(str(error)) from error
        if (row.get("setup"), row.get("pair")) != (setup, pair):
            raise self._index.damaged("another label is where it says")
        return row

    def is_judged(self, setup: str, pair: str) -> bool:
        """Whether a label has a probability, by the same keys as ``get``."""
        self._read_on()
        return (self._index.find(setup, pair) or (0, False))[1]

    def find(self, label_key: LabelKey, pairs: Iterable[Pair]) -> dict[str, LabelRow]:
        """Known labels, by the pairs' ids."""
        found = {pair.id: self.get(label_key.key, label_key.of(pair)) for pair in pairs}
        return {id: row for id, row in found.items() if row is not None}

    def missing(self, label_key: LabelKey, pairs: Iterable[Pair]) -> list[Pair]:
        """Pairs without a label, including those that could not be judged: a server may be available again."""
        return [pair for pair in pairs if not self.is_judged(label_key.key, label_key.of(pair))]

    def add(self, label_key: LabelKey, pair: Pair, label: Label) -> bool:
        """Append a label; False if it is already stored identically, or another process writes it.

        A kill loses nothing; a power cut loses at most the last ``SYNC_SECONDS``, since syncing every line may take
        longer than a server's answer.
        """
        if not is_first():
            return False
        row = {f.name: getattr(label, f.name) for f in fields(label)}
        if label.criteria is not None:
            row["criteria"] = [{k: v for k, v in asdict(one).items() if v is not None} for one in label.criteria]
        row = {name: value for name, value in row.items() if value is not None or name not in _OPTIONAL}
        row |= {"labeler": label_key.labeler, "setup": label_key.key, "pair": label_key.of(pair)}
        # Pairs that cannot be judged are asked in every pass, and usually fail in the same way.
        if self.get(label_key.key, row["pair"]) == row:
            return False
        due = time.monotonic() - self._synced >= SYNC_SECONDS
        append_lines(self.path, [row], synced=due)
        self._synced = time.monotonic() if due else self._synced
        return True

    def wait(self) -> None:
        """Wait until the first process has written its last label, and the others can read it."""
        wait()
        self._file = None  # a network file system shows it to another machine when the file is opened

    def _read_on(self) -> None:
        """Read the complete lines added since. Another process may be writing one."""
        if self._file is None:
            if not self.path.exists():
                return
            self._file = self.path.open("rb")
        covered = self._index.covered
        if os.fstat(self._file.fileno()).st_size == covered.bytes:
            return
        self._file.seek(covered.bytes)
        rows: list[tuple[str, str, int, bool]] = []
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file = self.path.open("rb")  # buffered data may be truncated and rewritten
                break
            found = self._read(line, f"{self.path}:{covered.lines + 1}")
            if found is not None:
                rows.append((found["setup"], found["pair"], covered.bytes, found.get("p") is not None))
            covered = Covered(
                covered.bytes + len(line),
                covered.lines + 1,
                covered.broken + (found is None),
                zlib.crc32(line, covered.checksum),
            )
            if len(rows) == _AT_ONCE:
                self._take(rows, covered)
                rows = []
        self._take(rows, covered)

    def _take(self, rows: list[tuple[str, str, int, bool]], covered: Covered) -> None:
        self._index.add(sorted(rows, key=lambda row: row[:2]), covered)
        self._uncommitted += len(rows)
        if self._uncommitted >= _AT_ONCE:
            self._index.commit()
            self._uncommitted = 0

    def _read(self, line: bytes, where: str) -> LabelRow | None:
        """A line's label; None if it is damaged."""
        try:
            row = unsealed(json.loads(line))
            if not all(isinstance(row[name], str) and row[name].isascii() for name in ("setup", "pair")):
                raise ValueError("its keys are no texts of ours")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._named += 1
            if self._named <= _NAMED:
                say(f"Warning: {where}: the line is damaged ({error}). A label that this run needs is made again.")
            return None
        _check_shares(cast(LabelRow, row), where)
        return cast(LabelRow, row)


def _check_shares(row: LabelRow, where: str) -> None:
    """Refuse invalid probabilities: they are hand-written, since damage is detected before."""
    found: list[tuple[str, Any]] = [(name, row.get(name)) for name in _SHARES]
    for name in _RATINGS:
        ratings = row.get(name, [])
        found += [(name, share) for share in (ratings if isinstance(ratings, list) else [[ratings]])]
    for name, value in found:
        if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
            fix = "Correct the line, or delete it; its label is then made again."
            what = f"'{name}' is {to_json(value).strip()}; it must be a probability from 0 to 1."
            raise UserError(what, where=where, fix=fix)


def once(keys: np.ndarray) -> np.ndarray:
    """Unique keys, in order of first occurrence."""
    return keys[np.sort(np.unique(keys, return_index=True)[1])]


def last_places(keys: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """Index of each key's last occurrence in ``everything``, which holds them all; int64."""
    order = np.argsort(everything, kind="stable")
    return order[np.searchsorted(everything[order], keys, side="right") - 1]


class Plan:
    """The pairs to label in one pass over the data, and its cost so far, on disk until the stage is complete.

    Batch composition may change a label's last digits; so a killed pass resumes with exactly its original batches,
    which follow from the plan's pairs.

    Args:
        path: A file in the run's state: a line with the pairs, followed by lines of notes.
        setup: ``LabelKey.key`` of the labels.
        missing: Keys of the pairs without a label, (M,) of dtype ``KEY``.
        everything: Keys of all N pairs of the pass.

    Attributes:
        places: Indices of the pairs without a label when the pass began, int64, each text once.
        noted: The last notes, by name.
    """

    def __init__(self, path: Path, setup: str, missing: np.ndarray, everything: np.ndarray) -> None:
        self.path = path
        stored, *notes = read_lines(path) or [{}]
        keys = np.array(stored.get("pairs", []) if stored.get("setup") == setup else [], dtype=KEY)
        self.noted: dict[str, Any] = {}
        # If there are pairs that the plan does not contain, it is made again: none stays without a label.
        if np.isin(keys, everything).all() and np.isin(missing, keys).all():
            for note in notes if len(keys) else ():
                self.noted |= note
        else:
            keys = once(missing)
            if len(keys):
                path.parent.mkdir(exist_ok=True)
                write_state(path, {"setup": setup, "pairs": [key.decode() for key in keys.tolist()]})
        self.places = last_places(keys, everything)

    def note(self, **found: Any) -> None:
        """Record what a resumed pass cannot recompute."""
        self.noted |= found
        append_lines(self.path, [found])
