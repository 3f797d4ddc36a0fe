"""Text that is safe to show, and numbers formatted for readers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

SHOWN_CHARACTERS = 4_000
MINUS = "\u2212"

# Characters that HTML or XML may reject: control characters except tab and newline, lone surrogates, noncharacters.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with line ends as ``\\n``, and U+FFFD for every character that cannot be shown."""
    return _UNSHOWABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def shorten(text: str) -> tuple[str, int]:
    """The first ``SHOWN_CHARACTERS`` characters, cleaned, and the number of characters left out."""
    return clean(text[:SHOWN_CHARACTERS]), max(len(text) - SHOWN_CHARACTERS, 0)


def label(value: Any, limit: int = 80) -> str:
    """A scalar on one line of at most ``limit`` characters; an empty string for None and containers."""
    if value is None or isinstance(value, (dict, list, tuple)):
        return ""
    text = str(value) if isinstance(value, (str, bool, int, float)) else repr(value)
    text = " ".join(clean(text[: limit * 4]).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value: Any) -> float | None:
    """A finite float, or None for anything else: null, text, a boolean, NaN, infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def interval(value: Any) -> tuple[float, float] | None:
    """The two ends of ``[lo, hi]``, or None if they are not two finite numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def section(parent: Any, *keys: str) -> dict[str, Any]:
    """The mapping found by following ``keys``; empty if there is none."""
    for key in keys:
        parent = parent.get(key) if isinstance(parent, Mapping) else None
    return dict(parent) if isinstance(parent, Mapping) else {}


def count(value: float | None, one: str = "", many: str = "") -> str:
    """``1,234 pairs`` or ``1 pair``; only the number if no noun is given; empty for None."""
    if value is None:
        return ""
    digits = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
    noun = one if value == 1 else (many or (one + "s" if one else ""))
    return f"{digits} {noun}".strip()


def percent(share: float | None) -> str:
    """A fraction in 0..1 as ``63.0%``."""
    return "" if share is None else f"{100 * share:.1f}%".replace("-", MINUS)


def scores(*values: float, sign: bool = False) -> list[str]:
    """Format numbers shown side by side, with as many decimals as the largest of them needs."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e6 or 0 < largest < 5e-3:
        style = ".2e"
    else:
        style = ".3f" if largest < 1 else ".2f" if largest < 100 else ",.1f"
    plus = "+" if sign else ""
    return [f"{value:{plus}{style}}".replace("-", MINUS) if value else "0" for value in values]


def score(value: float | None, *, sign: bool = False) -> str:
    """One number formatted as by ``scores``; an empty string for None."""
    return "" if value is None else scores(value, sign=sign)[0]


def preferred(p: float, first: str, second: str, neither: str = "no clear preference") -> str:
    """``first`` or ``second`` by the probability of the first; ``neither`` if it is shown as 0.50."""
    return neither if abs(p - 0.5) < 0.005 else first if p > 0.5 else second


def hundredths(value: float) -> str:
    """A correlation or a kappa, with two decimals."""
    # Rounded first, so that -1e-16 becomes zero.
    return f"{round(value, 2) + 0.0:.2f}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """``48 s``, ``12 min 5 s`` or ``3 h 20 min``; an empty string if the time is not known."""
    if seconds is None or seconds < 0:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def reasons(value: Any) -> str:
    """Format skipped items: ``{reason: count}`` as ``reason 3, other 1``, or a bare count; else empty."""
    if isinstance(value, Mapping):
        found = [(label(key, 60), number(amount)) for key, amount in list(value.items())[:12]]
        return ", ".join(f"{key} {count(amount)}" for key, amount in found if amount)
    amount = number(value)
    return count(amount) if amount else ""
