"""Loads prompts and pairs: parses every row by its format, and tracks ids, skips and problems."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar, get_args

from trl_rlaif.data import fields, formats
from trl_rlaif.data.messages import RowError, RowSkip, parse_prompt
from trl_rlaif.data.rows import Problems, Row, open_source
from trl_rlaif.data.scored import Unpaired, scored_pairs
from trl_rlaif.data.splitting import EMPTY_RESPONSE
from trl_rlaif.errors import UserError
from trl_rlaif.types import Loaded, Message, Pair, Prompt, Skip

PairFormat = Literal["auto", "preference", "responses", "hh", "kto", "scored"]
ScoredPairs = Literal["all", "best_worst"]

REPEATED = "repeated prompt of a preference file"

T = TypeVar("T")
A = TypeVar("A")


def load_prompts(
    source: str | Path, *, category: str = "category", columns: Mapping[str, str] | None = None
) -> Loaded[Prompt]:
    """Reads prompts.

    A row has a ``prompt``, which is a text, or a list of messages that ends with a user turn or with the start of
    the answer; or ``messages`` or ShareGPT's ``conversations``, whose trailing assistant turns are dropped; or
    Alpaca's ``instruction`` and ``input``. A row of a preference file has the prompt that `load_pairs` finds; a
    repeated one is read once. All rows must be of one kind.

    Args:
        source: A .jsonl, .json (one list), .csv or .txt (one prompt per line) file, each also with .gz, or a .parquet
            file; a folder written by `datasets.save_to_disk` or readable by `datasets.load_dataset`; or a Hub id. A
            folder or an id may end with ``:split``; the default split is ``train``.
        category: The column with the kind of prompt; rows without it have None.
        columns: The file's own column names, such as ``{"prompt": "question"}``.

    Raises:
        UserError: The source or some of its rows are invalid; up to ten problems with their locations.
    """
    uniform, known = _Uniform(), set[str]()

    def parse(row: Row, row_id: str) -> Prompt:
        prompt, used = formats.parse_prompt_row(row.values)
        uniform.check_prompt(prompt, row.where)
        if formats.is_preference(row.values):
            text = json.dumps(prompt)
            if text in known:
                raise RowSkip(REPEATED)
            known.add(text)
        return Prompt(row_id, prompt, *_rest(row, category, used))

    loading = _Loading(source, columns, formats.PROMPT_COLUMNS, parse)
    return Loaded(list(loading.items()), loading.skipped)


def load_pairs(
    source: str | Path,
    *,
    format: PairFormat = "auto",
    category: str = "category",
    seed: int = 42,
    columns: Mapping[str, str] | None = None,
    scored: ScoredPairs = "all",
) -> Loaded[Pair]:
    r"""Reads prompts with two responses each.

    Formats: ``preference`` is TRL's (``chosen`` and ``rejected``, with a prompt as in `load_prompts`, which they may
    repeat, or both starting with the same one); ``responses`` has a prompt, ``response_1``, ``response_2`` and
    optionally ``human`` (1, 2, 0 for a tie, or a list of votes); ``hh`` is Anthropic's raw transcripts
    (``"\n\nHuman: ...\n\nAssistant: ..."`` in ``chosen`` and ``rejected``); ``kto`` has a prompt, a ``completion``
    and a ``label``, true or false, and forms pairs from rows with the same prompt and opposite labels; ``scored``
    has a prompt, ``responses`` or ``completions``, and ``scores``. ``auto`` detects the format of the first row, which
    all rows must have.

    Rows with an empty response, with identical responses, or whose conversations diverge before the last
    turn are skipped and counted; so are KTO rows without a partner. If the data names the better response, a hash of
    the seed and the id decides which comes first, the same on every machine. Equal ``score_chosen`` and
    ``score_rejected``, and equal scores, are a tie: ``human`` is 0. A ``margin`` is kept in ``extra`` as a number.

    Args:
        source: As in `load_prompts`.
        format: The format of every row.
        category: The column with the kind of prompt; rows without it have None.
        seed: Seeds the order of the two responses.
        columns: The file's own column names, such as ``{"response_1": "answer_a"}``.
        scored: Which pairs of scored responses to form: all, or the best against the worst.

    Raises:
        UserError: The source or some of its rows are invalid (up to ten problems with their locations), or
            every row was skipped.
    """
    stream = stream_pairs(source, format=format, category=category, seed=seed, columns=columns, scored=scored)
    return Loaded(list(stream.items), stream.skipped)


def stream_pairs(
    source: str | Path, *, columns: Mapping[str, str] | None, format: PairFormat, category: str, seed: int, scored: str
) -> Stream[Pair]:
    """As ``load_pairs``, but each iteration reads the source again: memory holds one pair at a time, and all ids.

    It also holds all rows of a .json or .csv file. Problems of rows are raised after the last one.
    """
    if format not in get_args(PairFormat):
        raise UserError(f"Unknown format {format!r}.", fix=f"Use one of {', '.join(get_args(PairFormat))}.")

    def begin() -> _Loading[Pair]:
        pairs = _Pairs(format, category, seed, scored)
        read = (*formats.PROMPT_COLUMNS, *formats.RESPONSE_KEYS)
        return _Loading(source, columns, read, pairs.parse, pairs.split, pairs.unpaired.left)

    return Stream(begin)


def place_of(source: str | Path, id: str) -> str:
    """Location of the row with an id: file and line, or row; the source itself if there is no such row."""
    stem, rows = open_source(source, Problems())
    found = (row.where for row in rows if fields.parse_id(row.values.get("id"), f"{stem}-{row.number}") == id)
    return next(found, str(source))


class _Pairs:
    """Converts each row to preference rows, and these to pairs."""

    def __init__(self, format: PairFormat, category: str, seed: int, scored: str) -> None:
        self.format, self.category, self.seed, self.scored = format, category, seed, scored
        self.uniform, self.unpaired, self.shape = _Uniform(), Unpaired(), ""

    def split(self, row: Row, row_id: str) -> Iterable[Row]:
        """The row itself; for scored and KTO rows, the resulting preference rows."""
        shape = self.format if self.format != "auto" else self.uniform.check_shape(row)
        formats.check_columns(row.values, shape)
        self.shape = "preference" if shape in ("kto", "scored") else shape
        if shape == "scored":
            return list(scored_pairs(row, row_id, self.scored))
        return list(self.unpaired.pairs(row, row_id)) if shape == "kto" else [row]

    def parse(self, row: Row, row_id: str) -> Pair:
        """The pair of a row that ``split`` returned last."""
        values, human = row.values, None
        if self.shape == "responses":
            used = {"response_1", "response_2", "human"}
            prompt, first, second = formats.parse_responses(values)
            human = fields.parse_human(values.get("human"))
        else:
            used = {"chosen", "rejected"}
            parse_sides = formats.parse_hh if self.shape == "hh" else formats.parse_preference
            prompt, first, second = parse_sides(values)
            human = 1
            if _flipped(self.seed, row_id):
                first, second, human = second, first, 2
            human = 0 if formats.is_tie(values) else human
        self.uniform.check_prompt(prompt, row.where)
        kind, extra = _rest(row, self.category, used | formats.prompt_columns(values))
        margin = fields.parse_number(extra.pop("margin", None), "margin")
        return Pair(row_id, prompt, first, second, kind, human, extra | ({} if margin is None else {"margin": margin}))


def _flipped(seed: int, row_id: str) -> bool:
    return hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[0] % 2 == 1


def _rest(row: Row, category: str, used: set[str]) -> tuple[str | None, dict]:
    """The category of a row, and its unused columns."""
    extra = {key: value for key, value in row.values.items() if key not in used | {"id", category}}
    return fields.parse_category(row.values.get(category), category), extra


class Stream(Generic[T]):
    """The usable items of a source, in the order of its rows.

    Args:
        begin: Starts a pass over the source.

    Attributes:
        skipped: The rows that the last complete pass skipped.
    """

    def __init__(self, begin: Callable[[], _Loading[T]]) -> None:
        self._begin, self.skipped = begin, list[Skip]()

    @property
    def items(self) -> Iterator[T]:
        """A new pass."""
        loading = self._begin()
        yield from loading.items()
        self.skipped = loading.skipped

    def skip_counts(self) -> dict[str, int]:
        """As in Loaded."""
        return Loaded([], self.skipped).skip_counts()


class _Uniform:
    """Requires of every row the format and kind of prompt of the first row that shows them."""

    def __init__(self) -> None:
        self.shape: tuple[str, str] | None = None
        self.kind: tuple[str, str] | None = None

    def check_shape(self, row: Row) -> str:
        shape = formats.detect_format(row.values)
        if shape is None:
            raise RowSkip(EMPTY_RESPONSE)
        self.shape = self.shape or (shape, row.where)
        expected, where = self.shape
        if shape == "implicit" and expected == "preference":
            parse_prompt(None)
        self._compare(_SHAPES[shape], _SHAPES[expected], where)
        return shape

    def check_prompt(self, prompt: str | list[Message], where: str) -> None:
        kind = "a text prompt" if isinstance(prompt, str) else "a prompt made of messages"
        self.kind = self.kind or (kind, where)
        self._compare(kind, *self.kind)

    @staticmethod
    def _compare(found: str, expected: str, where: str) -> None:
        if found != expected:
            raise RowError(
                f"Mixed formats in one file: this row has {found}, and {where} has {expected}.",
                "Put each format in a file of its own.",
            )


_SHAPES = {
    "preference": "prompt, chosen and rejected",
    "implicit": "chosen and rejected that begin with the prompt",
    "responses": "response_1 and response_2",
    "hh": "Human/Assistant transcripts",
    "kto": "completion and label",
    "scored": "responses and scores",
}


def _as_it_is(row: Row, row_id: str) -> Iterable[Row]:
    return [row]


@dataclass
class _Loading(Generic[T]):
    """One pass over a source.

    Args:
        columns: The file's own column names.
        read: The columns used by this kind of data.
        parse: Makes an item from a row and its id.
        split: Makes the rows to parse from a row and its id.
        left: Returns further skipped rows at the end.
    """

    source: str | Path
    columns: Mapping[str, str] | None
    read: Collection[str]
    parse: Callable[[Row, str], T]
    split: Callable[[Row, str], Iterable[Row]] = _as_it_is
    left: Callable[[], list[Skip]] = list
    problems: Problems = field(default_factory=Problems)
    skipped: list[Skip] = field(default_factory=list)

    def items(self) -> Iterator[T]:
        """The items; after the last one, problems are raised and ``skipped`` is complete."""
        stem, rows = open_source(self.source, self.problems)
        self.names = fields.Columns(self.columns or {}, self.read)
        self.ids, found = dict[str, str](), False
        for row in map(self.names.renamed, rows):
            row_id = self._attempt(row, self._id, f"{stem}-{row.number}")
            pieces = None if row_id is None else self._attempt(row, self.split, row_id)
            for piece in pieces or ():
                item = self._attempt(piece, self._item, row_id)
                if item is not None:
                    found = True
                    yield item
        self.names.check()
        self.problems.raise_if_any()
        self.skipped += self.left()
        if not found:
            counts = ", ".join(f"{reason}: {count}" for reason, count in Loaded([], self.skipped).skip_counts().items())
            many = len(self.skipped)
            what = f"All {many} rows were skipped ({counts})." if counts else "The dataset is empty."
            raise UserError(what, where=str(self.source), fix="Give data with at least one usable row.")

    def _id(self, row: Row, default: str) -> str:
        return fields.parse_id(row.values.get("id"), default)

    def _item(self, row: Row, default: str) -> T:
        row_id = self._id(row, default)
        if row_id in self.ids:
            fix = 'Give every row an id of its own, or leave "id" out of all rows.'
            raise RowError(f"The id {row_id!r} is already used at {self.ids[row_id]}.", fix)
        self.ids[row_id] = row.where
        return self.parse(row, row_id)

    def _attempt(self, row: Row, do: Callable[[Row, str], A], given: str) -> A | None:
        """The result for a row; None if it is skipped or invalid."""
        try:
            return do(row, given)
        except RowSkip as skip:
            self.skipped.append(Skip(row.where, skip.reason))
        except RowError as error:
            self.problems.add(self.names.explained(error.what), where=row.where, fix=error.fix)
        return None
