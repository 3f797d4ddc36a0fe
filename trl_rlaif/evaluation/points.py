"""What a choice is worth: a win 1, a loss 0, a tie one half. Every measure that counts wins or agreement counts so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A mean over both orders may miss one half by its last digits.
_EVEN = 1e-9


def is_even(p: Any) -> Any:
    """Whether a probability prefers neither side, up to 1e-9: a bool, or one for each element of an array."""
    return abs(p - 0.5) < _EVEN


def points(p: Sequence[float]) -> list[float]:
    """Probabilities that the first is preferred as what the first gets: 1, 0, or 0.5 for a tie."""
    return [0.5 if is_even(x) else float(x > 0.5) for x in p]


def choices(p: Sequence[float | None]) -> list[int | None]:
    """Probabilities that response_1 is preferred as votes: 1, 2, or 0 for a tie; None stays None."""
    return [None if x is None else 0 if is_even(x) else 1 if x > 0.5 else 2 for x in p]


def agreement_points(p: Sequence[float], human: Sequence[int]) -> list[float]:
    """What each label gets for its agreement with a person's choice.

    Args:
        p: N probabilities that response_1 is preferred.
        human: N choices: 1, 2, or 0 for a tie.

    Returns:
        1 where both prefer the same response, 0 where they prefer different ones, 0.5 where either is a tie.
    """
    found = zip(points(p), human, strict=True)
    return [0.5 if h == 0 else x if h == 1 else 1 - x for x, h in found]
