"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927).

    Args:
        successes: 0..n; a half counts as a half.
        n: Trials, at least 1.
        confidence: In (0, 1).

    Returns:
        (low, high), in [0, 1].
    """
    if n < 1:
        raise ValueError("an interval needs at least one trial")
    z = float(norm.ppf((1 + confidence) / 2))
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: At least one number.
        confidence: In (0, 1).
        resamples: Samples drawn with replacement.
        seed: Of the draws.

    Returns:
        (low, high).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // array.size)  # bounds the memory of one draw
    means = []
    for start in range(0, resamples, rows):
        draws = rng.integers(array.size, size=(min(rows, resamples - start), array.size))
        means.append(array[draws].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
