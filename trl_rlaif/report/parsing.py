"""Shared by the readers of a run's files: tolerant parsing of lines, texts and numbers."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trl_rlaif.report.formatting import count, label, number, shorten
from trl_rlaif.stored_lines import Stored

# Beyond this, the drawing library's arithmetic overflows; no real metric is that large.
LARGEST_DRAWN = 1e30

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One message of a prompt, cut to the length shown; ``cut`` is the number of characters left out."""

    role: str
    text: str
    cut: int


def lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; unreadable lines are skipped, and noted except for a truncated last line."""
    return (row for _, row in _placed(path, notes))


def stored_lines(path: Path, notes: list[str]) -> StoredObjects:
    """The same as a sequence that stays on disk."""
    return StoredObjects(path, array("q", (place for place, _ in _placed(path, notes))))


def _placed(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects with the byte offsets of their lines."""
    if not path.is_file():
        return
    unreadable = place = 0
    with path.open("rb") as file:
        for raw in file:
            row = _parsed(raw)
            if row is not None:
                yield place, row
            elif raw.strip() and raw.endswith(b"\n"):
                unreadable += 1
            place += len(raw)
    if unreadable:
        were = "was" if unreadable == 1 else "were"
        notes.append(f"{count(unreadable, 'line')} of {path.name} could not be read and {were} skipped.")


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(raw.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class StoredObjects(Stored[dict[str, Any]]):
    """Objects of a JSON Lines file."""

    def _read(self, line: bytes, where: str) -> dict[str, Any]:
        """Empty if the file was replaced meanwhile."""
        return _parsed(line) or {}


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of the items, evenly spaced, in order."""
    if len(items) <= limit:
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def both(row: dict[str, Any], first: str, second: str) -> tuple[float, float] | None:
    """Two numbers of a row, or None if one of them cannot be drawn."""
    one, other = drawable(row.get(first)), drawable(row.get(second))
    return None if one is None or other is None else (one, other)


def turns(prompt: Any) -> list[Turn]:
    """A prompt's messages, at most 20; a text is one message."""
    if not isinstance(prompt, list):
        return [turn("", prompt)]
    shown = [
        turn(label(message.get("role"), 30), message.get("content")) if isinstance(message, dict) else turn("", message)
        for message in prompt[:20]
    ]
    left_out = len(prompt) - len(shown)
    return shown + ([Turn("", f"… {left_out:,} more messages", 0)] if left_out > 0 else [])


def turn(role: str, content: Any) -> Turn:
    """One message; content that is not a text is shown as JSON."""
    if content is None:
        content = ""
    text, cut = shorten(content if isinstance(content, str) else json.dumps(content, default=str))
    return Turn(role, text, cut)


def drawable(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    value = number(value)
    return value if value is not None and abs(value) <= LARGEST_DRAWN else None


def probability(value: Any) -> float | None:
    """A number in [0, 1], or None."""
    value = number(value)
    return value if value is not None and 0 <= value <= 1 else None
