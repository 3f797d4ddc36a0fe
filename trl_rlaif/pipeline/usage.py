"""A stage's usage of judge servers, stored until the stage is complete: a resumed run continues counting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif import distributed
from trl_rlaif.files import read_state, write_state
from trl_rlaif.judging.usage import Total, Usage
from trl_rlaif.pipeline import artifacts

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.results import AskedResults

# Seconds between writes; a kill loses as much.
KEPT_SECONDS = 1.0


class StoredTotal(Total):
    """The usage counted by this process. Each process has its own file.

    Args:
        folder: The stage's work folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / artifacts.usage_of(distributed.rank())
        super().__init__(_read(self._path))
        self._kept, self._closed = time.monotonic(), False

    def add(self, used: Usage) -> None:
        """Add usage, and store it at most once per second."""
        with self._lock:
            self.used += used
            if time.monotonic() - self._kept >= KEPT_SECONDS:
                self._keep()

    def close(self) -> None:
        """Store it for the last time; answers that arrive later are not counted."""
        with self._lock:
            self._keep()
            self._closed = True

    def _keep(self) -> None:
        if self.used != Usage() and not self._closed:
            self._path.parent.mkdir(exist_ok=True)
            write_state(self._path, self.used.row(), by_all=True)
            self._kept = time.monotonic()


def _read(path: Path) -> Usage:
    return Usage.of_row(read_state(path, "Without it what the judge's server has counted is counted from zero again."))


@contextmanager
def counted(context: Context, stage: str) -> Iterator[None]:
    """Count the usage of judge servers inside as the stage's."""
    before, total = context.total, StoredTotal(_folder(context, stage))
    context.total = total
    try:
        yield
    finally:
        total.close()
        context.total = before


def usage_numbers(context: Context, stage: str) -> AskedResults:
    """The usage of all processes; empty if no server was asked."""
    files = sorted(_folder(context, stage).glob(artifacts.usage_of("*")))
    used = sum(map(_read, files), Usage())
    return {} if used == Usage() else {"usage": used.row()}


def spent(numbers: Mapping[str, Any]) -> str:
    """The usage in a stage's line; empty if no server was asked."""
    usage = numbers.get("usage")
    if not usage:
        return ""
    cost = f" for {usage['cost']:.4g}" if usage["cost"] is not None else ""
    return f"{usage['input_tokens'] + usage['output_tokens']:,} tokens{cost}"


def _folder(context: Context, stage: str) -> Path:
    return context.folder.state / artifacts.work_of(stage)
