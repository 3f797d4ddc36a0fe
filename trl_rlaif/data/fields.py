"""Single columns of a row, checked; and a file's own names for them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from trl_rlaif.data.messages import RowError, blank, check_text, short
from trl_rlaif.data.rows import Row, kind_of
from trl_rlaif.errors import UserError


def parse_id(value: Any, default: str) -> str:
    """The row's id as text, or ``default`` if it has none."""
    if blank(value):
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"'id' is {kind_of(value)}.", "Write a text or a whole number.")
    return check_text(str(value), "id")


def parse_category(value: Any, key: str) -> str | None:
    """The category as text; None for a missing or blank one."""
    if blank(value):
        return None
    if isinstance(value, (list, dict)):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write one category, as a text.")
    return check_text(str(value), key)


def parse_number(value: Any, key: str) -> float | None:
    """A finite number, possibly given as text (as in CSV); None for a missing one."""
    if blank(value):
        return None
    try:
        number = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{key!r} is {short(value)}.", "Write a number.")
    return number


def columns(row: Collection[str]) -> str:
    """The row's first dozen columns, for an error."""
    return ", ".join(repr(str(key)) for key in list(row)[:12]) or "none"


class Columns:
    """A file's own column names.

    Args:
        names: Columns of the file by standard name.
        read: The standard names used by this kind of data. A column in ``names`` for one of them must exist.
    """

    def __init__(self, names: Mapping[str, str], read: Collection[str]) -> None:
        self.names, self._read = names, {key for key in names if key in read}
        self._missing = {key: names[key] for key in self._read}
        self._first, self._seen = "", dict[str, None]()

    def renamed(self, row: Row) -> Row:
        """The row under the standard names. An unrelated column that has one of them is dropped."""
        if not self.names:
            return row
        self._first = self._first or row.where
        self._seen |= dict.fromkeys(row.values)
        self._missing = {key: column for key, column in self._missing.items() if column not in row.values}
        found = {key: row.values[column] for key, column in self.names.items() if column in row.values}
        hidden = {*found, *self._read, *self.names.values()}
        return replace(row, values=found | {key: value for key, value in row.values.items() if key not in hidden})

    def explained(self, what: str) -> str:
        """A message about a row, with the file's own names of the columns it mentions."""
        own = [f"{key!r} is the column {column!r}" for key, column in self.names.items() if repr(key) in what]
        return f"{what} (By data.columns, {', '.join(own)}.)" if own else what

    def check(self) -> None:
        """Raises UserError if one of the columns is in no row."""
        if not self._missing or not self._first:
            return
        key, column = min(self._missing.items())
        near = difflib.get_close_matches(column, self._seen, n=1)
        raise UserError(
            f"There is no column {column!r}, which data.columns names as {key!r}.",
            where=self._first,
            fix=(f"Did you mean {near[0]!r}? " if near else "") + f"The columns are {columns(self._seen)}.",
        )


def parse_human(value: Any) -> int | None:
    """1 or 2, the response that a person (or a strict majority of votes) preferred; 0: a tie; None: unknown."""
    if isinstance(value, list):
        votes = [vote for vote in map(parse_human, value) if vote is not None]
        if not votes:
            return None
        return next((side for side in (1, 2) if 2 * votes.count(side) > len(votes)), 0)
    if blank(value):
        return None
    if isinstance(value, str) and value.strip() in ("0", "1", "2"):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1, 2):
        raise RowError(
            f"'human' is {short(value)}.",
            "Write 1 or 2 for the preferred response, 0 for a tie, or a list of votes.",
        )
    return int(value)
