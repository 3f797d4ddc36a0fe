"""Loads prompts and pairs: runs every row through its format, and keeps ids, skips and problems in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, get_args

from trl_rlaif.data import formats
from trl_rlaif.data.reading import Problems, Row, open_source
from trl_rlaif.data.records import Loaded, Message, Pair, Prompt, Skip
from trl_rlaif.errors import UserError

PairFormat = Literal["auto", "preference", "responses", "hh"]

T = TypeVar("T")


def load_prompts(source: str | Path, *, category: str = "category") -> Loaded[Prompt]:
    """Reads prompts.

    A row has a ``prompt``, which is a text or a list of messages that ends with a user turn, or
    ``messages``, whose assistant turns at the end are dropped. All rows are of one kind.

    Args:
        source: A .jsonl, .jsonl.gz, .json (one list), .csv or .parquet file; a folder written by
            `datasets.save_to_disk` or readable by `datasets.load_dataset`; or a Hub id. A folder or an
            id may end with ``:split``; without it, the split is ``train``.
        category: The column with the kind of prompt; rows without it have None.

    Raises:
        UserError: The source or some of its rows are wrong; up to ten problems with their places.
    """
    uniform = _Uniform()

    def parse(row: Row, row_id: str) -> Prompt:
        prompt, used = formats.parse_prompt_row(row.values)
        uniform.check_prompt(prompt, row.where)
        return Prompt(row_id, prompt, *_rest(row, category, used))

    return _load(source, parse)


def load_pairs(
    source: str | Path, *, format: PairFormat = "auto", category: str = "category", seed: int = 42
) -> Loaded[Pair]:
    r"""Reads prompts with two responses each.

    Formats: ``preference`` is TRL's (``chosen`` and ``rejected``, with a ``prompt`` or beginning with the
    same one); ``responses`` has ``prompt``, ``response_1``, ``response_2`` and maybe ``human`` (1, 2, 0 for
    a tie, or a list of votes); ``hh`` is Anthropic's raw transcripts (``"\n\nHuman: ...\n\nAssistant: ..."``
    in ``chosen`` and ``rejected``). ``auto`` goes by the first row, and all rows have to be like it.

    Rows with an empty response, with identical responses, or whose conversations part before the last
    turn are skipped and counted. For ``preference`` and ``hh``, which of the two responses comes first
    is decided by a hash of the seed and the id, the same on every machine.

    Args:
        source: As in `load_prompts`.
        format: The format of every row.
        category: The column with the kind of prompt; rows without it have None.
        seed: Seeds the order of the two responses.

    Raises:
        UserError: The source or some of its rows are wrong (up to ten problems with their places), or
            every row was skipped.
    """
    if format not in get_args(PairFormat):
        raise UserError(f"Unknown format {format!r}.", fix=f"Use one of {', '.join(get_args(PairFormat))}.")
    uniform = _Uniform()

    def parse(row: Row, row_id: str) -> Pair:
        shape = format if format != "auto" else uniform.check_shape(row)
        formats.check_columns(row.values, shape)
        human, used = None, {"prompt", "chosen", "rejected"}
        if shape == "responses":
            used = {"prompt", "response_1", "response_2", "human"}
            prompt, first, second = formats.parse_responses(row.values)
            human = formats.parse_human(row.values.get("human"))
        else:
            parse_sides = formats.parse_hh if shape == "hh" else formats.parse_preference
            prompt, first, second = parse_sides(row.values)
            human = 1
            if _flipped(seed, row_id):
                first, second, human = second, first, 2
        uniform.check_prompt(prompt, row.where)
        kind, extra = _rest(row, category, used)
        return Pair(row_id, prompt, first, second, kind, human, extra)

    return _load(source, parse)


def _flipped(seed: int, row_id: str) -> bool:
    return hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[0] % 2 == 1


def _rest(row: Row, category: str, used: set[str]) -> tuple[str | None, dict]:
    """The category of a row, and the columns that nothing else used."""
    extra = {key: value for key, value in row.values.items() if key not in used | {"id", category}}
    return formats.parse_category(row.values.get(category), category), extra


class _Uniform:
    """Holds every row to the format and the kind of prompt of the first row that shows them."""

    def __init__(self) -> None:
        self.shape: tuple[str, str] | None = None
        self.kind: tuple[str, str] | None = None

    def check_shape(self, row: Row) -> str:
        shape = formats.detect_format(row.values)
        if shape is None:
            raise formats.RowSkip(formats.EMPTY_RESPONSE)
        self.shape = self.shape or (shape, row.where)
        expected, where = self.shape
        if shape == "implicit" and expected == "preference":
            formats.parse_prompt(None)
        self._compare(_SHAPES[shape], _SHAPES[expected], where)
        return shape

    def check_prompt(self, prompt: str | list[Message], where: str) -> None:
        kind = "a text prompt" if isinstance(prompt, str) else "a prompt made of messages"
        self.kind = self.kind or (kind, where)
        self._compare(kind, *self.kind)

    @staticmethod
    def _compare(found: str, expected: str, where: str) -> None:
        if found != expected:
            raise formats.RowError(
                f"Mixed formats in one file: this row has {found}, and {where} has {expected}.",
                "Put each format in a file of its own.",
            )


_SHAPES = {
    "preference": "prompt, chosen and rejected",
    "implicit": "chosen and rejected that begin with the prompt",
    "responses": "response_1 and response_2",
    "hh": "Human/Assistant transcripts",
}


def _load(source: str | Path, parse: Callable[[Row, str], T]) -> Loaded[T]:
    problems = Problems()
    stem, rows = open_source(source, problems)
    loaded: Loaded[T] = Loaded([], [])
    seen: dict[str, str] = {}
    for row in rows:
        try:
            row_id = formats.parse_id(row.values.get("id"), f"{stem}-{row.number}")
            if row_id in seen:
                fix = 'Give every row an id of its own, or leave "id" out of all rows.'
                raise formats.RowError(f"The id {row_id!r} is already used at {seen[row_id]}.", fix)
            seen[row_id] = row.where
            loaded.items.append(parse(row, row_id))
        except formats.RowSkip as skip:
            loaded.skipped.append(Skip(row.where, skip.reason))
        except formats.RowError as error:
            problems.add(error.what, where=row.where, fix=error.fix)
    problems.raise_if_any()
    if not loaded.items:
        counts = ", ".join(f"{reason}: {count}" for reason, count in loaded.skip_counts().items())
        what = f"All {len(loaded.skipped)} rows were skipped ({counts})." if counts else "The dataset is empty."
        raise UserError(what, where=str(source), fix="Give data with at least one usable row.")
    return loaded


def load_rows(source: str | Path) -> list[dict]:
    """Rows of any source as they are, for data in a format of its own.

    Raises:
        UserError: As ``load_prompts``, but for what it says of prompts.
    """
    problems = Problems()
    _, rows = open_source(source, problems)
    values = [row.values for row in rows]
    if not values:
        problems.add("There are no rows.", where=str(source))
    problems.raise_if_any()
    return values
