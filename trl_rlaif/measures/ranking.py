"""Whether a reward model ranks pairs as people or a judge do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trl_rlaif.measures.categories import by_category
from trl_rlaif.measures.intervals import wilson


def pairwise_accuracy(
    chosen: Sequence[float], rejected: Sequence[float], categories: Sequence[str | None] | None = None
) -> dict[str, Any] | None:
    """Share of pairs in which a reward model scores the preferred response higher (Lee et al. 2023).

    Args:
        chosen, rejected: N scores each, of any reward model; infinite ones are scores too.
        categories: N kinds of prompt, or None.

    Returns:
        ``rate``, ``interval`` (95%, Wilson), ``n`` and ``ties``, equal scores, which count half; and with categories
        ``by_category``, the same for each of them. None without pairs.
    """
    pairs = list(zip(chosen, rejected, strict=True))
    if any(math.isnan(score) for pair in pairs for score in pair):
        raise ValueError("a score is NaN: it is neither higher nor lower than another")
    if not pairs:
        return None
    n, ties = len(pairs), sum(c == r for c, r in pairs)
    hits = sum(c > r for c, r in pairs) + ties / 2
    found = {"rate": hits / n, "interval": wilson(hits, n), "n": n, "ties": ties}
    if categories is not None:
        found["by_category"] = by_category(pairwise_accuracy, categories, chosen, rejected)
    return found
