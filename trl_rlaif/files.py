"""Atomic file writes, checksums, and JSON-lines files whose last line a kill may have truncated.

If several processes share a run, only the first one writes; in the others, functions that write do nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from trl_rlaif.distributed import is_first
from trl_rlaif.errors import RunError, TrlRlaifError, UserError

# Bytes: a disk with less free space is considered full.
_FULL = 256 << 10
_SEAL = "crc32"
_SIGNATURE = f"# {_SEAL}: "


def cache_dir() -> Path:
    """This user's cache folder, for models and answers that can be recreated."""
    return Path(os.environ.get("TRL_RLAIF_CACHE") or user_cache_path("trl-rlaif"))


def write_atomically(path: Path, text: str | Iterable[str], *, by_all: bool = False) -> None:
    """Replace a file by new text (UTF-8) atomically: a kill leaves the old or the new file.

    Args:
        path: The file.
        text: The whole text, or an iterable of parts, each written as it arrives.
        by_all: Write in every process; each has a file of its own.
    """
    if not (by_all or is_first()):
        return
    building = path.with_name(f".{path.name}.building")
    with building.open("w", encoding="utf-8", newline="\n") as file:  # the same bytes on every system
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(building, path)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder, which gets its name only when complete."""
    if not is_first():
        return
    building, old = (path.with_name(f".{path.name}.{state}") for state in ("building", "old"))
    for leftover in (building, old):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir(parents=True)
    write(building)
    if path.exists():
        os.rename(path, old)
    os.rename(building, path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's content to disk."""
    with path.open("r+b") as file:  # Windows cannot do it for a file that is only read
        os.fsync(file.fileno())


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digests_in(path: Path) -> dict[str, str]:
    """``digest_of`` every file below a folder, by relative path; for a single file, under the empty name."""
    if path.is_file():
        return {"": digest_of(path)}
    return {p.relative_to(path).as_posix(): digest_of(p) for p in sorted(path.rglob("*")) if p.is_file()}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in UTF-8; a lone surrogate in generated text is escaped, not an error."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    return text + "\n"


def to_line(row: Mapping[str, Any]) -> str:
    """A row as one line of a JSON-lines file."""
    return to_json(row)


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """An object with a checksum of its content, which detects later corruption.

    The checksum does not depend on the order of keys, which programs that rewrite JSON may change.
    """
    return {**row, _SEAL: _checksum(json.loads(json.dumps(row)))}  # JSON turns numeric keys into strings


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def unsealed(row: Any) -> dict[str, Any]:
    """The object given to ``sealed``. One without a checksum, such as one written by hand, is accepted as it is.

    Args:
        row: As parsed from JSON or YAML.

    Raises:
        ValueError: It is not an object, or its checksum differs.
    """
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    content = {key: value for key, value in row.items() if key != _SEAL}
    if _SEAL in row and _checksum(content) != row[_SEAL]:
        raise ValueError(
            f"it is not what was written: its {_SEAL} differs; if you changed it on purpose, remove {_SEAL}"
        )
    return content


def signed(text: str) -> str:
    """A YAML text with a checksum in a comment at its end."""
    return f"{text}{_SIGNATURE}{zlib.crc32(text.encode()):08x}\n"


def unsigned(text: str) -> str:
    """The text given to ``signed``."""
    before, found, _ = text.rpartition(_SIGNATURE)
    return before if found else text


def is_signed(content: bytes) -> bool:
    """Whether a file's content has a correct checksum of ``signed``, or none at all."""
    text, found, checksum = content.rpartition(_SIGNATURE.encode())
    return not found or checksum.strip() == b"%08x" % zlib.crc32(text)


def write_state(path: Path, content: Mapping[str, Any], *, by_all: bool = False) -> None:
    """Replace a state file by an object with a checksum; ``by_all`` as in ``write_atomically``."""
    write_atomically(path, to_line(sealed(content)), by_all=by_all)


def read_state(
    path: Path, without: str, fits: Callable[[dict[str, Any]], bool] = lambda content: True
) -> dict[str, Any]:
    """The object in a state file; {} if the file is missing.

    Args:
        path: File written by ``write_state``, or one without a checksum.
        without: A sentence for the error message about what happens without the file.
        fits: Whether an object is of this file's kind: another file of the run may have replaced it.

    Raises:
        UserError: It is damaged.
    """
    if not path.exists():
        return {}
    try:
        found = unsealed(json.loads(path.read_text(encoding="utf-8")))
        if fits(found):
            return found
    except (ValueError, RecursionError):
        pass
    raise UserError("The file is damaged.", where=str(path), fix=f"Restore it. {without}")


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, synced: bool = True) -> None:
    """Append rows to a JSON-lines file in one write, each with a checksum.

    Args:
        path: The file.
        rows: Without checksums.
        synced: Force them to disk, so they survive a power failure; otherwise, they survive only a kill.
    """
    if not is_first():
        return
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(to_line(sealed(row)) for row in rows))
        file.flush()
        if synced:
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of ``each_line``."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file written by ``append_lines``; none if it is missing.

    A last line that a kill truncated is removed from the file at the end, so that appended rows stay readable.

    Raises:
        UserError: A complete line is damaged: it cannot be parsed, or its checksum differs.
    """
    if not path.exists():
        return
    whole, cut_off = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            cut_off = not line.endswith(b"\n")
            if cut_off:
                break
            whole += len(line)
            yield parse_line(line, f"{path}:{number}")
    if cut_off and is_first():
        with path.open("r+b") as file:
            file.truncate(whole)


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Parse a row of a JSON-lines file written by ``append_lines``.

    Raises:
        UserError: It cannot be parsed, or its checksum differs.
    """
    try:
        return unsealed(json.loads(line))
    except (ValueError, RecursionError) as error:
        what = f"The line is damaged: {error}."
        raise UserError(what, where=where, fix="Restore the file, or delete the line.") from None


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Raise a clear error if code inside fails because a disk is full, whichever library it fails in.

    safetensors and torch raise their own exceptions, which name no file; torch's do not even name the reason.

    Args:
        folder: Folder in which files are written.

    Raises:
        RunError: A disk is full; with the file that the exception names, else the last one written below the folder.
    """
    try:
        yield
    except TrlRlaifError:
        raise
    except Exception as error:
        named = getattr(error, "filename", None)  # may be elsewhere, such as a cache or a temporary file
        place = Path(named).parent if isinstance(named, str) else folder
        free = shutil.disk_usage(place if place.is_dir() else folder).free
        # In the messages of OSError (ENOSPC) and SQLite.
        says_so = any(words in str(error) for words in (os.strerror(errno.ENOSPC), "database or disk is full"))
        if not says_so and not (isinstance(error, RuntimeError) and free < _FULL):
            raise
        where = named or _last_written(folder)
        what = f"The disk is full: {free // 1024:,} KiB are left on that of {place} ({error})."
        raise RunError(
            what, where=str(where), fix="Free some space. Finished work is kept: continue with --resume."
        ) from error


def _last_written(folder: Path) -> Path:
    found, last = folder, 0.0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process may remove it meanwhile
            if path.is_file() and path.stat().st_mtime > last:
                found, last = path, path.stat().st_mtime
    return found
