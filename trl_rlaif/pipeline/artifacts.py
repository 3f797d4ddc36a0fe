"""A run's folder: what lies in it, written whole or not at all, and which stages are complete.

Of several processes that share a run the first one writes; in the others what writes does nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_rlaif.distributed import is_first
from trl_rlaif.errors import RunError, UserError

# Where the outputs of stages that were redone are kept, a folder for each time; each is laid out as a run's folder.
SUPERSEDED = "superseded"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by new text (UTF-8): after a kill the old or the new one is there, never a half."""
    if not is_first():
        return
    building = path.with_name(f".{path.name}.building")
    with building.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(building, path)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder, and give it its name only when it is whole."""
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


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON in UTF-8; a lone surrogate in generated text is escaped, not an error."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    return text + "\n"


def to_line(row: dict[str, Any]) -> str:
    """A row as one line of a JSON-lines file."""
    return _to_json(row)


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file in one write, and see it on the disk."""
    if not is_first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(to_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file of ours; [] where it is missing.

    A last line that a kill cut off is removed from the file, so that what is appended stays readable.

    Raises:
        RunError: A line in the middle is broken: somebody changed the file.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"The line is no JSON: {error}", where=f"{path}:{number}") from None
    return rows


class RunFolder:
    """The folder of one run.

    Args:
        path: Is made if it is missing.

    Raises:
        UserError: It cannot be made or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(exist_ok=True)
            probe = self.state / "writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process of the run may have been here
        except OSError as error:
            raise UserError(
                f"The output folder cannot be written to: {error.strerror}.",
                where=str(self.path),
                fix="Name another one with --output.",
            ) from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def state(self) -> Path:
        """Where a run keeps what only itself needs."""
        return self.path / ".state"

    @property
    def is_used(self) -> bool:
        """Whether a run lives here already."""
        return (self / "recipe.yaml").exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out while a run writes here; the lock ends with the process."""
        if not is_first():
            yield
            return
        with (self.state / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError("Another process is running in this folder.", where=str(self.path)) from None
            yield

    # ---- Stages ---------------------------------------------------------------------------------------

    def marker(self, stage: str) -> dict[str, Any]:
        """A stage's ``fingerprint``, its ``inputs``, and whether it is ``complete``; {} before it has begun."""
        path = self.state / f"{stage}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_marker(self, stage: str, marker: dict[str, Any]) -> None:
        """Replace what is known of a stage."""
        write_atomically(self.state / f"{stage}.json", json.dumps(marker))

    def is_complete(self, stage: str, fingerprint: str | None = None) -> bool:
        """Whether a stage has ended; with a fingerprint, whether it did so with these very inputs."""
        marker = self.marker(stage)
        whole = marker.get("complete") and "superseding" not in marker  # a kill may have come before it was moved
        return bool(whole) and fingerprint in (None, marker.get("fingerprint"))

    def begin(self, stage: str, fingerprint: str, inputs: dict[str, Any] | None = None) -> None:
        """Open a stage."""
        known = {"fingerprint": fingerprint, "complete": False}
        self.write_marker(stage, known if inputs is None else known | {"inputs": inputs})

    def complete(self, stage: str, fingerprint: str) -> None:
        """Close a stage: ``--resume`` skips it from now on."""
        self.write_marker(stage, self.marker(stage) | {"fingerprint": fingerprint, "complete": True})

    # ---- Numbers --------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """The final numbers of every stage that has ended."""
        path = self / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add_results(self, stage: str, numbers: dict[str, Any]) -> None:
        """Put one stage's final numbers into results.json."""
        results = self.results() | {stage: numbers}
        write_atomically(self / "results.json", _to_json(results, indent=2))

    def drop_results(self, stage: str) -> None:
        """Forget one stage's final numbers."""
        results = self.results()
        if results.pop(stage, None) is not None:
            write_atomically(self / "results.json", _to_json(results, indent=2))

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """A stage's rows of metrics.jsonl."""
        return [row for row in read_lines(self / "metrics.jsonl") if row.get("stage") == stage]

    def add_metrics(self, stage: str, step: int, numbers: dict[str, Any]) -> None:
        """Append a logged step to metrics.jsonl."""
        if is_first():
            with (self / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(to_line({"stage": stage, "step": step, **numbers}))

    def drop_metrics(self, stage: str, after: int = -1) -> None:
        """Forget a stage's metrics behind a step, which are about to be computed again."""
        if not is_first():
            return
        rows = read_lines(self / "metrics.jsonl")
        kept = [r for r in rows if r.get("stage") != stage or r.get("step", 0) <= after]
        if len(kept) < len(rows):
            write_atomically(self / "metrics.jsonl", "".join(map(to_line, kept)))
