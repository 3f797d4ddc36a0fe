"""Whether a reward model ranks pairs as people or a judge do."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

from trl_rlaif.evaluation.categories import by_category
from trl_rlaif.evaluation.intervals import share_interval


def pairwise_accuracy(
    chosen: Sequence[float],
    rejected: Sequence[float],
    categories: Sequence[str | None] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, Any] | None:
    """Share of pairs in which a reward model scores the preferred response higher (Lee et al. 2023).

    Args:
        chosen, rejected: N scores each, of any reward model; infinite ones are scores too.
        categories: N kinds of prompt, or None.
        clusters: What each pair depends on, N entries, such as its prompt; None: on nothing.

    Returns:
        ``rate``, ``interval`` (95%, ``share_interval``), ``n`` and ``ties``, equal scores, which count half;
        and with categories ``by_category``, the same for each of them. None without pairs.
    """
    pairs = list(zip(chosen, rejected, strict=True))
    if any(math.isnan(score) for pair in pairs for score in pair):
        raise ValueError("a score is NaN: it is neither higher nor lower than another")
    if not pairs:
        return None
    right = [0.5 if c == r else float(c > r) for c, r in pairs]
    found = {
        "rate": sum(right) / len(right),
        "interval": share_interval(right, clusters),
        "n": len(right),
        "ties": right.count(0.5),
    }
    if categories is not None:
        alone = range(len(pairs)) if clusters is None else clusters
        found["by_category"] = by_category(
            lambda c, r, of: pairwise_accuracy(c, r, clusters=of), categories, chosen, rejected, alone
        )
    return found
