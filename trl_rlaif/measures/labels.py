"""What a labeler's output says of the labeler: agreement, position bias, mass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

from trl_rlaif.measures.intervals import bootstrap_mean, wilson


def agreement(p: Sequence[float], human: Sequence[int | None]) -> dict[str, Any] | None:
    """AI labeler alignment: share of pairs where the label's choice is the human's (Lee et al. 2023, 3.3).

    Args:
        p: N probabilities that response_1 is preferred.
        human: N choices: 1, 2, 0 for a tie or None for unknown; ties and unknowns are left out.

    Returns:
        ``rate``, ``interval`` (95%, Wilson) and ``n``; a label of exactly 0.5 counts half. None if there
        is nothing to compare with.
    """
    counted = [(a, h) for a, h in zip(p, human, strict=True) if h in (1, 2)]
    if not counted:
        return None
    hits = sum(0.5 if a == 0.5 else float((a > 0.5) == (h == 1)) for a, h in counted)
    return {"rate": hits / len(counted), "interval": wilson(hits, len(counted)), "n": len(counted)}


def length_preference(
    p: Sequence[float], human: Sequence[int | None], lengths: Sequence[tuple[int, int]]
) -> dict[str, Any] | None:
    """How often the labels and the people prefer the longer response, on the same pairs.

    Args:
        p: N probabilities that response_1 is preferred; exactly 0.5 counts half.
        human: N choices: 1, 2, 0 for a tie, which counts half, or None for unknown, which is left out.
        lengths: N pairs of the lengths of response_1 and response_2; pairs of equal length are left out.

    Returns:
        ``judge`` and ``people``, shares in [0, 1]; ``interval`` (95%, bootstrap over the pairs) of ``judge`` -
        ``people``; ``n``. None without such pairs.
    """
    rows = [
        (_points(x > 0.5, x == 0.5, first > second), _points(choice == 1, choice == 0, first > second))
        for x, choice, (first, second) in zip(p, human, lengths, strict=True)
        if choice is not None and first != second
    ]
    if not rows:
        return None
    judge, people = zip(*rows, strict=True)
    return {
        "judge": sum(judge) / len(rows),
        "people": sum(people) / len(rows),
        "interval": bootstrap_mean([a - b for a, b in rows]),
        "n": len(rows),
    }


def _points(first: bool, tie: bool, wanted: bool) -> float:
    """1 where the first response is preferred just when it is wanted, a half for a tie, else 0."""
    return 0.5 if tie else float(first == wanted)


def position_bias(p_12: Sequence[float], p_21: Sequence[float]) -> dict[str, Any] | None:
    """Share of pairs where the same position wins in both orders (Lee et al. 2023, section 2.1).

    Args:
        p_12, p_21: N probabilities that response_1 is preferred, shown first and shown second.

    Returns:
        ``rate``, ``interval`` (95%, Wilson), ``n``, and how often the ``first`` and the ``second`` position
        won both times; None without pairs.
    """
    n = len(p_12)
    if n == 0:
        return None
    first = sum(a > 0.5 > b for a, b in zip(p_12, p_21, strict=True))
    second = sum(a < 0.5 < b for a, b in zip(p_12, p_21, strict=True))
    return {
        "rate": (first + second) / n,
        "interval": wilson(first + second, n),
        "n": n,
        "first": first,
        "second": second,
    }


def summarize_mass(masses: Sequence[float], low: float = 0.5) -> dict[str, Any] | None:
    """Mean, minimum and number of low masses; a low mass says that the judge did not get the question."""
    if not masses:
        return None
    return {"mean": sum(masses) / len(masses), "min": min(masses), "low": sum(m < low for m in masses)}


def compare_agreement(p: Sequence[float], other: Sequence[float], human: Sequence[int]) -> dict[str, Any] | None:
    """Whether two labelers agree with people equally often, on the same pairs (exact McNemar test).

    Args:
        p, other: N probabilities each that response_1 is preferred.
        human: N choices, 1 or 2.

    Returns:
        ``difference`` of the agreement rates, ``better`` and ``worse``: pairs that only the one or only the
        other got right, and the two-sided ``p_value``; None without pairs. Exactly 0.5 is not right.
    """
    if not human:
        return None
    right = [[x != 0.5 and (x > 0.5) == (h == 1) for x, h in zip(xs, human, strict=True)] for xs in (p, other)]
    better = sum(a and not b for a, b in zip(*right, strict=True))
    worse = sum(b and not a for a, b in zip(*right, strict=True))
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {
        "difference": (better - worse) / len(human),
        "better": better,
        "worse": worse,
        "p_value": float(p_value),
        "n": len(human),
    }
