"""Reads a file, a folder or a Hub dataset into plain rows, each with its location."""

from __future__ import annotations

import ast
import csv
import difflib
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_rlaif.errors import Problem, UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".txt", ".parquet")
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<split>.+))?")
_HUB_ID_MAX = 96
# Rows of a Parquet file in memory at a time.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Row:
    """One row: ``number`` counts rows from 1, ``where`` is the location for error messages."""

    where: str
    number: int
    values: dict[str, Any]


@dataclass
class Problems:
    """Collects the problems of one pass to report them together: the first ``limit``, and the number of others."""

    limit: int = 10
    found: list[Problem] = field(default_factory=list)
    more: int = 0

    def add(self, what: str, *, where: str = "", fix: str = "", first: bool = False) -> None:
        """Adds a problem at the end, or at the beginning if it is the cause of the others."""
        self.found.insert(0 if first else len(self.found), Problem(what, where, fix))
        self.more += len(self.found) > self.limit
        del self.found[self.limit :]

    def raise_if_any(self) -> None:
        """Raises UserError with all problems, if there are any."""
        if self.more:
            self.found.append(Problem(f"... and {self.more} more problem{'s' if self.more > 1 else ''}."))
            self.more = 0
        if self.found:
            raise UserError.from_problems(self.found)


def open_source(source: str | Path, problems: Problems) -> tuple[str, Iterator[Row]]:
    """Finds the data and returns the stem for automatic ids and an iterator over the rows.

    Problems of single rows go to ``problems`` while iterating. A source that cannot be read at all
    raises UserError, here or while iterating.
    """
    text = os.path.expanduser(str(source))
    if not text.strip():
        raise UserError("No data source is given.", fix="Give the path of a file or folder, or a Hub id.")
    # os.path and not Path: these two answer False for names that the system cannot even look up.
    if os.path.isfile(text):
        return _open_file(Path(text), problems)
    folder, _, split = text.partition(":")
    for name, part in ((text, "train"), (folder, split)):
        if part and os.path.isdir(name):
            return Path(name).resolve().name, _dataset_rows(_load_folder(Path(name), part), name)
    hub = _HUB_ID.fullmatch(text)
    if isinstance(source, str) and hub and len(hub["name"]) <= _HUB_ID_MAX and not _looks_like_path(text):
        dataset = _load_hub(hub["name"], hub["split"] or "train")
        return hub["name"].rpartition("/")[2], _dataset_rows(dataset, text)
    raise UserError("There is no such file or folder.", where=text, fix=_did_you_mean(Path(text)))


def _looks_like_path(text: str) -> bool:
    """Whether a name that does not exist is more likely a path than a Hub id."""
    parent, name = os.path.split(text.partition(":")[0])
    return name.lower().endswith(SUFFIXES) or ("." in name and os.path.isdir(parent or "."))


def _did_you_mean(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f"The folder {str(path.parent)!r} does not exist either."
    try:
        names = os.listdir(path.parent)
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(str(path.parent / name)) for name in close)}?" if close else ""


# Files


def _open_file(path: Path, problems: Problems) -> tuple[str, Iterator[Row]]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}
    name = path.name.lower()
    compressed = name.endswith(".gz")
    suffix = os.path.splitext(name.removesuffix(".gz"))[1]
    if suffix == ".parquet" and not compressed:
        return path.name[: -len(suffix)], _read_parquet(path, problems)
    if suffix not in readers:
        raise UserError(
            f"Files of the kind {path.suffix or 'without a suffix'!r} are not read.",
            where=str(path),
            fix=f"Use one of {', '.join(SUFFIXES)}.",
        )
    _check_head(path, compressed)
    stem = path.name[: -len(suffix) - len(".gz") * compressed]
    return stem, readers[suffix](path, problems)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns an OSError on reading ``path`` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"The file cannot be read: {error.strerror or error}.", where=str(path)) from error


# Initial bytes of files that are not text, or not data at all.
_HEADS = {
    b"PAR1": ("This is Parquet data.", "Name it .parquet."),
    b"PK\x03\x04": ("This is a zip archive.", "Unpack it."),
    b"version https://git-lfs": ("This is a pointer of Git LFS, not the data.", "Run `git lfs pull`."),
    b"\xff\xfe": ("The text is UTF-16.", "Save it as UTF-8."),
    b"\xfe\xff": ("The text is UTF-16.", "Save it as UTF-8."),
}


def _check_head(path: Path, compressed: bool) -> None:
    """Reports a wrong container or encoding once, instead of for every line."""
    with _readable(path), open(path, "rb") as stream:
        head = stream.read(32)
    if compressed and head and not head.startswith(b"\x1f\x8b"):
        raise UserError("This is not gzip data.", where=str(path), fix="Compress it, or drop '.gz' from its name.")
    if not compressed and head.startswith(b"\x1f\x8b"):
        raise UserError("This is gzip data.", where=str(path), fix=f"Name it {path.name}.gz, or decompress it.")
    for beginning, (what, fix) in _HEADS.items():
        if head.startswith(beginning):
            raise UserError(what, where=str(path), fix=fix)


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, bytes]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    count = 0
    with _readable(path), opener(path, "rb") as stream:
        try:
            for line in stream:
                count += 1
                yield count, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            problems.add(
                f"The gzip data is broken here or before ({_one_line(error)}).",
                where=f"{path}:{count + 1}",
                fix="Download or compress the file again.",
                first=True,  # damaged data may decode to thousands of damaged lines before this shows
            )


def _parse_json(text: str) -> Any:
    """Parses JSON, or raises ValueError. NaN and the infinities, which are not JSON, become null."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _text_lines(path: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """(location, text) of each line that is not blank."""
    for number, line in _lines(path, problems):
        where = f"{path}:{number}"
        try:
            # Files joined with `cat` can have a BOM in the middle, so it is dropped on every line.
            text = line.decode("utf-8").lstrip("\ufeff")
        except UnicodeDecodeError as error:
            problems.add(f"Byte {error.start + 1} of the line is not UTF-8.", where=where, fix="Save it as UTF-8.")
            continue
        if text.strip():
            yield where, text


def _read_txt(path: Path, problems: Problems) -> Iterator[Row]:
    for number, (where, text) in enumerate(_text_lines(path, problems), 1):
        if number == 1 and text.startswith("{") and text.rstrip().endswith("}"):
            raise UserError("The line is a JSON object, not a prompt.", where=where, fix="Name the file .jsonl.")
        yield Row(where, number, {"prompt": text.rstrip("\r\n")})


def _read_jsonl(path: Path, problems: Problems) -> Iterator[Row]:
    for number, (where, text) in enumerate(_text_lines(path, problems), 1):
        try:
            values = _parse_json(text.strip())
        except ValueError as error:
            problems.add(f"Invalid JSON: {error}.", where=where, fix="Write one JSON object per line.")
            continue
        if isinstance(values, dict):
            yield Row(where, number, values)
        else:
            listed = ", and name a file that is one JSON list .json" if isinstance(values, list) else ""
            problems.add(
                f"The line is {kind_of(values)}, not a JSON object.",
                where=where,
                fix=f'Write one object per line, such as {{"prompt": "..."}}{listed}.',
            )


def _read_text(path: Path) -> str:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with _readable(path), opener(path, "rb") as stream:
        try:
            data = stream.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            fix = "Download or compress the file again."
            raise UserError(f"The gzip data is broken ({_one_line(error)}).", where=str(path), fix=fix) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError("The line is not UTF-8.", where=f"{path}:{line}", fix="Save the file as UTF-8.") from None


def _read_json(path: Path, problems: Problems) -> Iterator[Row]:
    text = _read_text(path)
    if not text.strip():
        return
    fix = "Write one list of objects, or name a file with one object per line .jsonl."
    try:
        rows = _parse_json(text)
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"Invalid JSON: {error}.", where=f"{path}{line}", fix=fix) from None
    if not isinstance(rows, list):
        raise UserError(f"The file holds {kind_of(rows)}, not a list.", where=str(path), fix=fix)
    for number, values in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if isinstance(values, dict):
            yield Row(where, number, values)
        else:
            problems.add(f"The row is {kind_of(values)}, not an object.", where=where, fix=fix)


def _read_csv(path: Path, problems: Problems) -> Iterator[Row]:
    # strict: without it, one unclosed quote silently swallows the rest of the file.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    with _long_csv_cells():
        try:
            table = [cells for cells in reader if any(cell.strip() for cell in cells)]
        except csv.Error as error:
            fix = 'Put cells with commas, quotes or line breaks in "quotes", and double the quotes in them.'
            raise UserError(f"Invalid CSV: {error}.", where=f"{path}:{reader.line_num}", fix=fix) from None
    header = [name.strip() for name in table[0]] if table else []
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"The column {repeated[0]!r} appears more than once.", where=f"{path}:1")
    for number, cells in enumerate(table[1:], 1):
        where = f"{path}: row {number}"
        if len(cells) == len(header):
            yield Row(where, number, {name: _cell(cell) for name, cell in zip(header, cells, strict=True)})
        else:
            problems.add(f"The row has {len(cells)} cells, and the header has {len(header)}.", where=where)


def _cell(text: str) -> Any:
    """A cell's text; messages written by JSON or pandas are parsed; an empty cell is None."""
    if text.startswith("[{"):
        for parse in (_parse_json, ast.literal_eval):
            try:
                found = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and all(isinstance(item, dict) for item in found):
                return found
    return text or None


@contextmanager
def _long_csv_cells() -> Iterator[None]:
    """Lifts the csv module's limit of 128 KiB per cell, a process-wide setting."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", number, _plain(values))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        where = f"{path}: row {number + 1}" if number else str(path)
        problems.add(f"The Parquet file cannot be read: {_one_line(error)}.", where=where)


# Folders and the Hub


def _load_folder(path: Path, split: str) -> Any:
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with _datasets_errors(f"The dataset saved in {str(path)!r} cannot be read", str(path)):
            saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            fix = f"Choose one of its splits: {', '.join(f'{path}:{name}' for name in saved)}."
            raise UserError(f"The dataset has no split {split!r}.", where=str(path), fix=fix)
        return saved[split]
    with _datasets_errors(f"The folder {str(path)!r} holds no data that can be read", str(path)):
        return datasets.load_dataset(str(path.resolve()), split=split)


def _load_hub(name: str, split: str) -> Any:
    import datasets

    what = f"There is no file or folder {name!r}, and it cannot be loaded from the Hub"
    fix = _did_you_mean(Path(name)) if os.path.isdir(Path(name).parent) else ""
    fix = fix or "Check the spelling, the network and, for a private dataset, `hf auth login`."
    with _datasets_errors(what, name, fix):
        return datasets.load_dataset(name, split=split)


@contextmanager
def _datasets_errors(what: str, where: str, fix: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets`, its readers and the Hub client raise a dozen unrelated classes
        cause = f"{error} ({error.__cause__})" if error.__cause__ else error
        fix = f"Write {where}:SPLIT to choose a split." if "split" in str(error).lower() else fix
        raise UserError(f"{what}: {_one_line(cause)}.", where=where, fix=fix) from error


def _dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    with _datasets_errors("A row cannot be read", name):
        for number, values in enumerate(dataset, 1):
            yield Row(f"{name}: row {number}", number, _plain(values))


def _plain(value: Any) -> Any:
    """Arrow's values as JSON's: NaN and infinities become null, and types that JSON lacks (dates, decimals) text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 300 else text[:300] + " [...]"


def kind_of(value: Any) -> str:
    """The type of a JSON value, in words for an error message."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
