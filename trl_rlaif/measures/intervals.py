"""Confidence intervals of shares, means, ratios and whatever else can be computed from resampled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of any statistic of n rows (Efron 1979).

    Args:
        statistic: From (B, n) int64, the rows of each of B resamples, to their (B,) values; NaN where it is undefined.
        n: Rows, at least 1. Rows that belong together, as the tokens of one response do, must be one row.
        confidence: In (0, 1).
        resamples: Samples drawn with replacement.
        seed: Of the draws.

    Returns:
        (low, high) over the resamples in which the statistic is defined. None if it is undefined in more than a tenth
        of them: those that are left would be no fair sample.
    """
    if n < 1:
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // n)  # bounds the memory of one draw
    parts = []
    for start in range(0, resamples, rows):
        parts.append(statistic(rng.integers(n, size=(min(rows, resamples - start), n))))
    values = np.concatenate(parts)
    defined = values[~np.isnan(values)]
    if defined.size < 0.9 * values.size:
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: At least one number.
        confidence, resamples, seed: As of ``bootstrap``.

    Returns:
        (low, high); both NaN if a value is.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any():
        return math.nan, math.nan
    return bootstrap(
        lambda draws: array[draws].mean(axis=1), array.size, confidence=confidence, resamples=resamples, seed=seed
    )


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators), the two of a row drawn together.

    Args:
        numerators, denominators: N >= 1 finite numbers each; the denominators are not negative.
        confidence, resamples, seed: As of ``bootstrap``.

    Returns:
        (low, high); None if more than a tenth of the resamples have only zeros as denominators.
    """
    rows = np.array(list(zip(numerators, denominators, strict=True)), dtype=np.float64).reshape(-1, 2)

    def ratio(draws: np.ndarray) -> np.ndarray:
        above, below = rows[draws].sum(axis=1).T
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)

    return bootstrap(ratio, len(rows), confidence=confidence, resamples=resamples, seed=seed)
