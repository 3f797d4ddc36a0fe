"""Metrics by prompt category, and the spread of scores between categories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

UNNAMED = "(none)"


def by_category(
    measure: Callable[..., Any], categories: Sequence[str | None], *columns: Sequence[Any]
) -> dict[str, Any]:
    """Any metric, computed for each prompt category separately.

    Args:
        measure: Called with the rows of a category, a list for each of ``columns``.
        categories: N prompt categories; rows without one are grouped under "(none)".
        columns: N entries each, for example the probabilities and the human choices of ``agreement``.

    Returns:
        What ``measure`` returns, by category in alphabetical order.
    """
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for category, *row in zip(categories, *columns, strict=True):
        rows[category or UNNAMED].append(tuple(row))
    return {name: measure(*map(list, zip(*found, strict=True))) for name, found in sorted(rows.items())}


def category_figures(scores: Sequence[float], categories: Sequence[str | None]) -> dict[str, Any]:
    """Mean and standard deviation of every category's scores, and the spread between categories.

    Args:
        scores: N finite scores.
        categories: N prompt categories.

    Returns:
        ``categories``: n, mean and std (of the population) by category; ``relative_spread``: standard deviation of the
        category means over that of all scores; ``std_ratio``: largest over smallest standard deviation of a category
        (None if one is 0, or fewer than two categories have two scores).
    """

    def figures_of(values: list[float]) -> dict[str, Any]:
        return {"n": len(values), "mean": float(np.mean(values)), "std": float(np.std(values))}

    figures = by_category(figures_of, categories, scores)
    spread = float(np.std(np.asarray(scores, dtype=float))) if len(scores) else 0.0
    stds = [f["std"] for f in figures.values() if f["n"] > 1]
    means = [f["mean"] for f in figures.values()]
    return {
        "categories": figures,
        "relative_spread": float(np.std(means)) / spread if spread and len(means) > 1 else None,
        "std_ratio": max(stds) / min(stds) if len(stds) > 1 and min(stds) > 0 else None,
    }
