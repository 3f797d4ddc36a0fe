"""Length of two policies' responses to the same prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from trl_rlaif.evaluation.intervals import bootstrap_mean, bootstrap_ratio, share_interval


def compare_lengths(
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Length of A's responses beside that of B's to the same prompts: what a win rate may owe to length.

    Args:
        lengths, other_lengths: N lengths of A's and of B's responses, in characters or tokens alike.
        clusters: What each prompt depends on, N entries, such as its text; None: on nothing.
        seed: Of the bootstrap.

    Returns:
        ``mean`` and ``other_mean`` with ``interval`` and ``other_interval``; ``ratio`` of the means with
        ``ratio_interval`` (all 95%, bootstrap over the prompts); ``longer``, the share of prompts on which A is longer,
        half for equal lengths, with ``longer_interval`` (95%, ``share_interval``); ``n``. The ratio is None if all
        of B's responses are empty. None without prompts.
    """
    pairs = list(zip(lengths, other_lengths, strict=True))
    if not pairs:
        return None
    n, longer = len(pairs), [(a > b) + (a == b) / 2 for a, b in pairs]
    total, other = sum(lengths), sum(other_lengths)
    return {
        "mean": total / n,
        "interval": bootstrap_mean(lengths, clusters, seed=seed),
        "other_mean": other / n,
        "other_interval": bootstrap_mean(other_lengths, clusters, seed=seed),
        "ratio": total / other if other else None,
        "ratio_interval": bootstrap_ratio(lengths, other_lengths, clusters, seed=seed),
        "longer": sum(longer) / n,
        "longer_interval": share_interval(longer, clusters),
        "n": n,
    }
