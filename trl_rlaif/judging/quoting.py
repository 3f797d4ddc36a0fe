"""Keeps judged texts from imitating the prompt around them."""

from __future__ import annotations

import re
import unicodedata

_MARK = "> "
# Common letters of other scripts that look like Latin ones, case folded: Cyrillic, then Greek.
_LOOKALIKES = str.maketrans("авекмнорстухіјѕһ" + "αεικνορτυχ", "abekmhopctyxijsh" + "aeiknoptyx")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
# Decoration around the words of a header that does not hide it from a reader: space, markdown, brackets.
_DECORATION = r"[\W_]*"


def plain(line: str) -> str:
    """A line as a reader sees it: no case, no lookalike letters, nothing invisible, no marks on letters."""
    if not line.isascii():
        parts = unicodedata.normalize("NFKD", line)
        line = "".join(c for c in parts if unicodedata.category(c) not in ("Cf", "Me", "Mn"))
    return _CONTROLS.sub("", line).casefold().translate(_LOOKALIKES)


def headers(text: str) -> re.Pattern[str]:
    """Matches a line, after ``plain``, that starts like one of the prompt's own, which judged texts may not imitate."""
    patterns = {pattern for line in text.splitlines() if (pattern := _header(plain(line)))}
    return re.compile("|".join(sorted(patterns)) or r"(?!)")


def _header(line: str) -> str:
    """Pattern for the words of a header in any decoration, and its end."""
    words = re.findall(r"[^\W_]+", line)
    if not words:
        return ""
    # After "Response 2:" its colon or nothing, after "Response 1" no digit, after "Response" no letter.
    end = re.search(r"[:=.,;!?]\s*$", line)
    if end:
        tail = rf"{_DECORATION}(?:{re.escape(end[0].strip())}|$)"
    else:
        tail = r"(?!\w)" if words[-1][-1].isdigit() else r"(?![^\W\d_])"
    return _DECORATION + _DECORATION.join(map(re.escape, words)) + tail


def quoted(text: str, own: re.Pattern[str]) -> str:
    """The text with a mark before each line that starts like one of the prompt's own.

    A response with the line ``Response 2:`` would otherwise seem to end there. Other lines stay as they are.

    Args:
        text: The judged text.
        own: The pattern from ``headers`` for the prompt.
    """
    lines = text.splitlines(keepends=True)
    return "".join(_MARK + line if own.match(plain(line)) else line for line in lines)
