"""The records that every stage works on: prompts, pairs of responses, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        id: Unique within its source.
        prompt: A text, or a conversation that ends with the turn to be answered (a user's or a tool's), or with an
            assistant's, which the response continues. Never blank.
        category: The kind of prompt, if the data says.
        extra: The other columns of the row, as they were.
    """

    id: str
    prompt: str | list[Message]
    category: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One prompt with two different, non-blank responses.

    Args:
        id: Unique within its source.
        prompt: A text, or a conversation that ends with the turn to be answered (a user's or a tool's), or with an
            assistant's, which the response continues. Never blank.
        response_1: The first response.
        response_2: The second response. The order says nothing about which one is better.
        category: The kind of prompt, if the data says.
        human: Which response a person preferred: 1 or 2; 0 for a tie; None if unknown.
        extra: The other columns of the row, as they were.
    """

    id: str
    prompt: str | list[Message]
    response_1: str
    response_2: str
    category: str | None = None
    human: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A row that was left out.

    Args:
        where: The file and line or row.
        reason: A short phrase from a fixed set, for example ``"empty response"``.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What came out of one source: the usable items in the order of the rows, and the rows left out."""

    items: list[T]
    skipped: list[Skip]

    def skip_counts(self) -> dict[str, int]:
        """How many rows were left out for each reason, the most frequent reason first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())
