"""Keeps a judged text from passing for a part of the prompt around it."""

from __future__ import annotations

import re
import unicodedata

_MARK = "> "
# Common letters of other scripts that pass for Latin ones, case folded: Cyrillic, then Greek.
_LOOKALIKES = str.maketrans("авекмнорстухіјѕһ" + "αεικνορτυχ", "abekmhopctyxijsh" + "aeiknoptyx")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
# What may stand around the words of a header without hiding it from a reader: space, markdown, brackets.
_DECORATION = r"[\W_]*"


def plain(line: str) -> str:
    """A line as a reader sees it: no case, no lookalike letters, nothing invisible, no marks on letters."""
    if not line.isascii():
        parts = unicodedata.normalize("NFKD", line)
        line = "".join(c for c in parts if unicodedata.category(c) not in ("Cf", "Me", "Mn"))
    return _CONTROLS.sub("", line).casefold().translate(_LOOKALIKES)


def headers(text: str) -> re.Pattern[str]:
    """Matches a line, made plain, that begins like one of a prompt's own, which no judged text must imitate."""
    patterns = {pattern for line in text.splitlines() if (pattern := _header(plain(line)))}
    return re.compile("|".join(sorted(patterns)) or r"(?!)")


def _header(line: str) -> str:
    """The words of a header in whatever decoration, and what ends it."""
    words = re.findall(r"[^\W_]+", line)
    if not words:
        return ""
    # Behind "Response 2:" its colon or nothing, behind "Response 1" no digit, behind "Response" no letter.
    end = re.search(r"[:=.,;!?]\s*$", line)
    if end:
        tail = rf"{_DECORATION}(?:{re.escape(end[0].strip())}|$)"
    else:
        tail = r"(?!\w)" if words[-1][-1].isdigit() else r"(?![^\W\d_])"
    return _DECORATION + _DECORATION.join(map(re.escape, words)) + tail


def quoted(text: str, own: re.Pattern[str]) -> str:
    """The text with a mark before each line that begins like one of the prompt's own.

    A response that holds the line ``Response 2:`` would else seem to end there. Other lines stay as they are.

    Args:
        text: What is judged.
        own: What ``headers`` gave for the prompt.
    """
    lines = text.splitlines(keepends=True)
    return "".join(_MARK + line if own.match(plain(line)) else line for line in lines)
