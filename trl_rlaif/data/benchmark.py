"""Preference files in RewardBench's format: a prompt, right responses, wrong responses, a subset."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_rlaif.data import fields, formats
from trl_rlaif.data.messages import RowError, RowSkip, check_text
from trl_rlaif.data.rows import Problems, Row, kind_of, open_source
from trl_rlaif.errors import UserError
from trl_rlaif.types import Message

# RewardBench 2's subset with several right answers per prompt, and its ids: a row with one of them, and with all.
TIES = "ties"
REF, TIED = "ref", "tied"
_TIES_ID = re.compile(rf"({REF}|{TIED}):(\d+)")


@dataclass(frozen=True)
class BenchmarkRow:
    """A prompt and the responses that a reward model should distinguish.

    Args:
        id: As in the file; in the subset Ties ``ref:N`` or ``tied:N``.
        subset, section: None if the file names none.
        chosen: The right responses: one, or in tied rows of Ties two or more.
        rejected: One or more wrong responses.
        where: The row's location.
    """

    id: str
    subset: str | None
    section: str | None
    prompt: str | list[Message]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    where: str

    @property
    def ties(self) -> tuple[str, int] | None:
        """In the subset Ties: ``ref`` or ``tied``, and the number that both rows share; otherwise None."""
        found = _TIES_ID.fullmatch(self.id) if is_ties(self.subset) else None
        return (found[1], int(found[2])) if found else None


def is_ties(subset: str | None) -> bool:
    """Whether a subset is scored as RewardBench 2's Ties."""
    return subset is not None and subset.lower() == TIES


def load_benchmark(source: str | Path) -> list[BenchmarkRow]:
    """Read a benchmark.

    ``chosen`` and ``rejected`` are a text each (RewardBench), or lists of texts (RewardBench 2); or conversations, of
    which the last turn counts, as in TRL's preference format. ``subset`` and ``section`` may be missing.

    Args:
        source: A file, a folder or a Hub id, as ``NAME:SPLIT``.

    Raises:
        UserError: It cannot be read, or some of its rows are invalid: up to ten problems with their locations.
    """
    problems, found = Problems(), list[BenchmarkRow]()
    stem, rows = open_source(source, problems)
    ties: dict[tuple[str, int], str] = {}
    for row in rows:
        try:
            parsed = _parsed(row, f"{stem}-{row.number}")
            if parsed.ties is not None and ties.setdefault(parsed.ties, row.where) != row.where:
                raise RowError(f"The id {parsed.id!r} is already used at {ties[parsed.ties]}.", "Give it once.")
            found.append(parsed)
        except RowSkip as skip:
            problems.add(f"The row cannot be scored: {skip.reason}.", where=row.where)
        except RowError as error:
            problems.add(error.what, where=row.where, fix=error.fix)
    problems.raise_if_any()
    if not found:
        raise UserError("The dataset is empty.", where=str(source))
    if ties and not {n for kind, n in ties if kind == REF} & {n for kind, n in ties if kind == TIED}:
        fix = f"Its score compares each row {TIED}:N with {REF}:N; give both."
        raise UserError("The subset Ties has no prompt in both forms.", where=str(source), fix=fix)
    return found


def _parsed(row: Row, default: str) -> BenchmarkRow:
    values = row.values
    for key in ("chosen", "rejected"):
        if key not in values:
            raise RowError(f"The row has no {key!r}: its columns are {fields.columns(values)}.", f'Write "{key}".')
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    if any(_is_conversation(values[key]) for key in ("chosen", "rejected")):
        prompt, one, other = formats.parse_preference(values)
        chosen, rejected = (one,), (other,)
    else:
        prompt, _ = formats.parse_prompt_row(values)
        chosen, rejected = (_texts(values[key], key) for key in ("chosen", "rejected"))
    subset, section = (fields.parse_category(values.get(key), key) for key in ("subset", "section"))
    row_id = fields.parse_id(values.get("id"), default)
    found = BenchmarkRow(row_id, subset, section, prompt, chosen, rejected, row.where)
    _check(found, values.get("num_correct"))
    return found


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _texts(value: Any, key: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of texts.")
    if not texts:
        raise RowError(f"{key!r} is an empty list.", "Give at least one response.")
    for text in texts:
        if not isinstance(text, str):
            raise RowError(f"{key!r} holds {kind_of(text)}.", "Write a list of texts.")
    return tuple(check_text(text, key) for text in texts)


def _check(row: BenchmarkRow, num_correct: Any) -> None:
    chosen = len(row.chosen)
    if num_correct is not None and num_correct != chosen:
        what = f"'num_correct' is {num_correct}, and 'chosen' has {chosen} responses."
        raise RowError(what, "Write the right responses alone in chosen.")
    if not is_ties(row.subset):
        if chosen > 1:
            raise RowError(f"'chosen' has {chosen} responses.", "Only the subset Ties has several that are right.")
        return
    if row.ties is None:
        raise RowError(f"In the subset Ties the id is {row.id!r}.", f"Write {REF}:N or {TIED}:N, as RewardBench 2.")
    if (row.ties[0] == TIED) != (chosen > 1):
        what = f"The row {row.id} has {chosen} right responses."
        raise RowError(what, f"A row {REF}:N has one, a row {TIED}:N two or more.")
