"""labels.jsonl: an append-only store in which every label is found by what determined it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from trl_rlaif.data import Pair
from trl_rlaif.distributed import is_first
from trl_rlaif.encoding import as_messages
from trl_rlaif.errors import UserError
from trl_rlaif.files import append_lines, read_lines, to_json, unsealed, write_state
from trl_rlaif.pipeline.rows import LabelRow
from trl_rlaif.progress import say
from trl_rlaif.types import Label

# Fields of a label that are probabilities, or lists of them.
_SHARES = ("p", "p_12", "p_21", "mass_12", "mass_21")
_RATINGS = ("ratings_1", "ratings_2")
# Damaged lines that get a warning each.
_NAMED = 5
# Fields that most labelers leave empty; a line holds them only where they are not.
_OPTIONAL = (
    "skipped", "score_1", "score_2", "spread_1", "spread_2", *_RATINGS, "bound_12", "bound_21", "voted", "criteria",
)  # fmt: skip


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def pair_key(pair: Pair, columns: Collection[str] = ()) -> str:
    """What of a pair determines its label: the texts, whatever the pair is called, and what is in some columns."""
    also = [{name: pair.extra.get(name) for name in columns}] if columns else []
    turns = [(m["role"], m["content"]) for m in as_messages(pair.prompt)]
    return _digest(turns, pair.response_1, pair.response_2, *also)


@dataclass(frozen=True)
class LabelKey:
    """What determines a label beside the pair.

    Args:
        labeler: Name of the labeler.
        options: Its options.
        judge: Name of the judge.
        judge_revision: Version of its weights and tokenizer, how they are held, what its chat template is told, and
            the date that this writes.
        prompt_revision: Changes with any file of the judge's prompt.
        columns: Other columns of the data that it depends on; they follow from the rest.
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
        # Without criteria as before there were any.
        options = {name: value for name, value in self.options.items() if (name, value) != ("criteria", {})}
        parts = asdict(self) | {"options": options}
        return _digest({name: value for name, value in parts.items() if name != "columns"})

    def of(self, pair: Pair) -> str:
        """What determines the label on the pair's side: 16 hexadecimal digits."""
        return pair_key(pair, self.columns)


class LabelStore:
    """The labels of a folder, of any number of label keys.

    A line is a label with the keys that find it, ``setup`` (LabelKey.key) and ``pair``. Lines are only ever appended;
    of several with the same keys the last one counts. Files of several machines are joined by concatenation.

    Args:
        path: labels.jsonl. What a power cut left of a last line is removed from it; a broken line elsewhere,
            such as between two joined files, is passed over with a warning and counted in ``broken``.

    Raises:
        UserError: A probability is outside [0, 1].
    """

    def __init__(self, path: Path) -> None:
        self.path, self.broken = path, 0
        self._rows: dict[tuple[str, str], LabelRow] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content) and is_first():
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            where = f"{path}:{number}"
            try:
                row = unsealed(json.loads(line))
                self._rows[row["setup"], row["pair"]] = row
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.broken += 1
                if self.broken <= _NAMED:
                    say(f"Warning: {where}: the line is damaged ({error}). A label that this run needs is made again.")
                continue
            _check_shares(row, where)
        if self.broken > _NAMED:
            say(f"Warning: {path}: {self.broken - _NAMED} more lines are damaged.")

    def of_setup(self, setup: str) -> dict[str, LabelRow]:
        """The labels of one label key by ``pair_key``; ``setup`` is ``LabelKey.key``."""
        return {pair: row for (of, pair), row in self._rows.items() if of == setup}

    def find(self, label_key: LabelKey, pairs: Iterable[Pair]) -> dict[str, LabelRow]:
        """Labels that are known, by the pairs' ids."""
        found = {pair.id: self._rows.get((label_key.key, label_key.of(pair))) for pair in pairs}
        return {id: row for id, row in found.items() if row is not None}

    def missing(self, label_key: LabelKey, pairs: Iterable[Pair]) -> list[Pair]:
        """Pairs without a label. What could not be judged is among them: a server may be back."""
        found = ((pair, self._rows.get((label_key.key, label_key.of(pair)))) for pair in pairs)
        return [pair for pair, row in found if row is None or row["p"] is None]

    def add(self, label_key: LabelKey, pair: Pair, label: Label) -> None:
        """Append a label, and see it on the disk. One that is there already, word for word, adds no line."""
        row = {f.name: getattr(label, f.name) for f in fields(label)}
        if label.criteria is not None:
            row["criteria"] = [{k: v for k, v in asdict(one).items() if v is not None} for one in label.criteria]
        row = {name: value for name, value in row.items() if value is not None or name not in _OPTIONAL}
        row |= {"labeler": label_key.labeler, "setup": label_key.key, "pair": label_key.of(pair)}
        # What cannot be judged is asked in every pass, and mostly fails as before.
        if self._rows.get((label_key.key, row["pair"])) != row:
            append_lines(self.path, [row])
            self._rows[label_key.key, row["pair"]] = row


def _check_shares(row: LabelRow, where: str) -> None:
    """Refuse what is no probability: a person has written it, since what damage leaves is noticed before."""
    found: list[tuple[str, Any]] = [(name, row.get(name)) for name in _SHARES]
    for name in _RATINGS:
        ratings = row.get(name, [])
        found += [(name, share) for share in (ratings if isinstance(ratings, list) else [[ratings]])]
    for name, value in found:
        if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
            fix = "Correct the line, or delete it: its label is then made again."
            what = f"'{name}' is {to_json(value).strip()}; it is a probability, from 0 to 1."
            raise UserError(what, where=where, fix=fix)


class Plan:
    """Which pairs a pass over the data labels, and what it took so far, kept on disk until the stage is complete.

    What is computed together may change a label's last digits; so a pass that was killed goes on with the
    very batches that it began with, and those follow from the pairs of the plan.

    Args:
        path: A file of the run's state: a line with the pairs, and behind it lines with what was noted.
        label_key: The labels' key.
        missing: Pairs that have no label.
        everything: All pairs of the pass.

    Attributes:
        pairs: Those that had no label when the pass began.
        noted: What was noted last, by name.
    """

    def __init__(self, path: Path, label_key: LabelKey, missing: Sequence[Pair], everything: Sequence[Pair]) -> None:
        self.path = path
        stored, *notes = read_lines(path) or [{}]
        by_key = {label_key.of(pair): pair for pair in everything}
        keys = stored.get("pairs", []) if stored.get("setup") == label_key.key else []
        self.noted: dict[str, Any] = {}
        # With pairs that the plan does not know, it is made anew: nothing stays without a label.
        if all(key in by_key for key in keys) and {label_key.of(p) for p in missing} <= set(keys):
            self.pairs = [by_key[key] for key in keys]
            for note in notes if keys else ():
                self.noted |= note
            return
        self.pairs = list(dict((label_key.of(pair), pair) for pair in missing).values())
        if self.pairs:
            path.parent.mkdir(exist_ok=True)
            write_state(path, {"setup": label_key.key, "pairs": [label_key.of(p) for p in self.pairs]})

    def note(self, **found: Any) -> None:
        """Keep what a pass that is resumed cannot find out again."""
        self.noted |= found
        append_lines(self.path, [found])
