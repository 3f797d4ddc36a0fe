"""A reward model's results on a benchmark: accuracy by subset, and RewardBench 2's Ties score."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_rlaif.evaluation.categories import by_category
from trl_rlaif.evaluation.intervals import bootstrap, share_interval

# Weights in the Ties score (Malik et al. 2025, arXiv 2506.01937, and its published code) of: accuracy on tied and on
# ref prompts; right answers closer to each other than to the best wrong one; the same, where the ref prompt's gap must
# be wider, too; and how much wider, in (-1, 1).
_WEIGHTS = np.array([0.3, 0.3, 0.2, 0.2, 0.01])
_PARTS = ("accuracy_tied", "accuracy_ref", "prefers_correctness", "prefers_correctness_hard", "margin")


@dataclass(frozen=True)
class ScoredRow:
    """A benchmark's row with its scores.

    Args:
        chosen, rejected: Scores of the right and the wrong responses; finite.
        cluster: The group of dependent rows that it belongs to, such as its prompt.
    """

    chosen: Sequence[float]
    rejected: Sequence[float]
    cluster: Hashable


def best_of(row: ScoredRow) -> float:
    """The points of a row with one right response: 1 if it has the highest score; a tie for it is split evenly.

    In pairs a tie counts one half, as everywhere here.
    """
    scores = [*row.chosen, *row.rejected]
    best = max(scores)
    return 1 / scores.count(best) if row.chosen[0] == best else 0.0


def benchmark_accuracy(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Fraction of rows whose right response has the highest score.

    Args:
        rows: N >= 1, with one right response each.

    Returns:
        ``rate``; ``interval`` (95%, ``share_interval`` over the clusters); ``n``; ``ties``, rows in which the right
        response shares the highest score with others.
    """
    points = [best_of(row) for row in rows]
    return {
        "rate": sum(points) / len(points),
        "interval": share_interval(points, [row.cluster for row in rows]),
        "n": len(points),
        "ties": sum(0 < point < 1 for point in points),
    }


def accuracy_by(names: Sequence[str | None], rows: Sequence[ScoredRow]) -> dict[str, dict[str, Any]]:
    """``benchmark_accuracy`` of each subset, or section, by name."""
    return by_category(benchmark_accuracy, names, rows)


def ties_score(ref: dict[int, ScoredRow], tied: dict[int, ScoredRow]) -> dict[str, Any]:
    """RewardBench 2's score of prompts with several right answers (Malik et al. 2025).

    A model should score every right answer above every wrong one, with little preference among right answers: the gap
    between the worst right and the best wrong answer is compared with the spread of the right answers.

    Args:
        ref: Rows with one right answer, by prompt number.
        tied: Rows with several; at least one number is in both.

    Returns:
        ``score``, the sum of 0.3 times the accuracy on tied and on ref prompts each, 0.2 times the fractions of
        ``prefers_correctness`` (gap > spread) and of ``prefers_correctness_hard`` (also the ref prompt's gap), and 0.01
        times the mean ``margin``, tanh(smaller gap / spread - 1), which is 0 if both are; the parts; ``interval``
        (95%, bootstrap over prompts; None for a single one); ``n`` rows. The score may reach 1.01.
    """
    numbers = sorted(ref.keys() | tied.keys())
    parts = np.array([_ties_parts(ref.get(number), tied.get(number)) for number in numbers])
    means = np.nanmean(parts, axis=0)

    def score(draws: np.ndarray) -> np.ndarray:
        drawn = parts[draws]
        known = ~np.isnan(drawn)
        counts = known.sum(axis=1)
        sums = np.where(known, drawn, 0).sum(axis=1)
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0) @ _WEIGHTS

    return {
        "score": float(means @ _WEIGHTS),
        **dict(zip(_PARTS, map(float, means), strict=True)),
        "interval": bootstrap(score, len(numbers)) if len(numbers) > 1 else None,
        "n": len(ref) + len(tied),
    }


def _ties_parts(ref: ScoredRow | None, tied: ScoredRow | None) -> list[float]:
    """The parts for one prompt; NaN if a required row is missing."""
    gaps = [np.nan if row is None else min(row.chosen) - max(row.rejected) for row in (tied, ref)]
    found = [float(gap > 0) if row is not None else np.nan for row, gap in zip((tied, ref), gaps, strict=True)]
    if ref is None or tied is None:
        return [*found, np.nan, np.nan, np.nan]
    spread, smaller = max(tied.chosen) - min(tied.chosen), min(gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(np.float64(smaller) / spread - 1), nan=0.0)
    return [*found, float(gaps[0] > spread), float(smaller > spread), float(margin)]
