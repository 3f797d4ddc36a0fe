"""Progress bars, and one line for each finished stage, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)

# Without a terminal a bar cannot be redrawn; then a line is written this often.
LINE_SECONDS = 20.0


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; yields a function that adds to what is done."""
    if not console.is_terminal:
        yield _lines(description, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _lines(description: str, total: int, done: int) -> Callable[[int], None]:
    start, first, last = time.monotonic(), done, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            left = (now - start) / max(done - first, 1) * (total - done)
            say(f"  {description}: {done} of {total}, about {left:.0f} s left")

    return advance


def say(message: str) -> None:
    """One line for the person who waits; its text is never taken for markup."""
    console.print(message, markup=False, soft_wrap=True)
