"""Scores by kind of prompt, and how far the kinds lie apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

UNNAMED = "(none)"


def category_figures(scores: Sequence[float], categories: Sequence[str | None]) -> dict[str, Any]:
    """Mean and standard deviation of every category's scores, and their spread between categories.

    Args:
        scores: N finite scores.
        categories: N kinds of prompt.

    Returns:
        ``categories``: n, mean and std (of the population) by category; ``relative_spread``: standard deviation of the
        category means over that of all scores; ``std_ratio``: largest over smallest standard deviation of a category
        (None where one is 0, or there are no two categories, each with two scores).
    """
    rows: dict[str, list[float]] = defaultdict(list)
    for score, category in zip(scores, categories, strict=True):
        rows[category or UNNAMED].append(float(score))
    figures = {
        name: {"n": len(values), "mean": float(np.mean(values)), "std": float(np.std(values))}
        for name, values in sorted(rows.items())
    }
    spread = float(np.std(np.asarray(scores, dtype=float))) if len(scores) else 0.0
    stds = [f["std"] for f in figures.values() if f["n"] > 1]
    means = [f["mean"] for f in figures.values()]
    return {
        "categories": figures,
        "relative_spread": float(np.std(means)) / spread if spread and len(means) > 1 else None,
        "std_ratio": max(stds) / min(stds) if len(stds) > 1 and min(stds) > 0 else None,
    }
