"""Keeps a judged text from passing for a part of the prompt around it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

_MARK = "> "


def _bare(line: str) -> str:
    """What a line begins with to a reader: no decoration, no lookalike letters, no case."""
    plain = unicodedata.normalize("NFKC", line).casefold()
    return re.sub(r"^[\W_]+", "", re.sub(r"[\u200b-\u200f\u2060\ufeff]", "", plain))


def headers(text: str) -> frozenset[str]:
    """The lines of a prompt's own text that a judged text must not imitate, in the form that is compared."""
    return frozenset(bare for line in text.splitlines() if (bare := _bare(line).strip()))


def quoted(text: str, own: Collection[str]) -> str:
    """The text with a mark before each line that begins like one of the prompt's own.

    A response that holds the line ``Response 2:`` would else seem to end there. Other lines stay as they are.

    Args:
        text: What is judged.
        own: What ``headers`` gave for the prompt.
    """
    if not any(header in _bare_all(text) for header in own):
        return text
    lines = text.splitlines(keepends=True)
    return "".join(_MARK + line if _bare(line).startswith(tuple(own)) else line for line in lines)


def _bare_all(text: str) -> str:
    return "\n".join(map(_bare, text.splitlines()))
