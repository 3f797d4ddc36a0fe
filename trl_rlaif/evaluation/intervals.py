"""Confidence intervals for proportions, means, ratios and any statistic of resampled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.stats import norm


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927).

    Args:
        successes: 0..n; a half counts as a half.
        n: Trials, at least 1.
        confidence: In (0, 1).

    Returns:
        (low, high), in [0, 1].
    """
    if n < 1:
        raise ValueError("an interval needs at least one trial")
    share = successes / n
    return _score_interval(share, share * (1 - share), n, confidence)


def share_interval(
    points: Sequence[float], clusters: Sequence[Hashable] | None = None, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson score interval for the mean of numbers in [0, 1], possibly clustered.

    For wins and losses (1 and 0) it is Wilson's. Ties (0.5) narrow it, since it uses the variance of the points.
    Clusters widen it: the number of points is divided by the design effect (Kish 1965, section 5.4), the variance of
    the mean with clusters over that without, in which cluster totals are compared as in a ratio estimate. To both
    variances one more cluster of identical points is added, as far from the mean as a coin's: if all points are wins,
    each cluster counts as one point.

    Args:
        points: N >= 1 numbers in [0, 1].
        clusters: The cluster of each point, N entries, for example the prompts; None: all independent.
        confidence: In (0, 1).

    Returns:
        (low, high), in [0, 1].

    Raises:
        ValueError: There are no points, or one is not in [0, 1].
    """
    found = np.asarray(points, dtype=np.float64)
    if not found.size:
        raise ValueError("an interval needs at least one point")
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError("the interval of a share needs numbers in [0, 1]")
    share = float(found.mean())
    variance = float(((found - share) ** 2).mean())
    return _score_interval(share, variance, found.size / _design_effect(found - share, clusters), confidence)


def _score_interval(share: float, variance: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval: z^2 observations of variance 1/4 and mean 1/2 are added to the n of the data."""
    z = float(norm.ppf((1 + confidence) / 2))
    centre = n * share + z * z / 2
    half = z * math.sqrt(n * variance + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))


def _design_effect(residuals: np.ndarray, clusters: Sequence[Hashable] | None) -> float:
    """The design effect, at least 1: how many clustered points are worth one independent point."""
    if clusters is None:
        return 1.0
    index = cluster_index(clusters, residuals.size)
    sizes = np.bincount(index)
    if len(sizes) in (1, residuals.size):
        return residuals.size / len(sizes)
    size = float((sizes**2).sum()) / residuals.size  # of a point's cluster, on average
    between = float((np.bincount(index, residuals) ** 2).sum()) * len(sizes) / (len(sizes) - 1)
    return max(1.0, (between + size**2 / 4) / (float((residuals**2).sum()) + size / 4))


def clusters_of(clusters: Sequence[Hashable] | None, rows: Sequence[int]) -> list[Hashable] | None:
    """The clusters of some of the rows; None if there are no clusters."""
    return None if clusters is None else [clusters[i] for i in rows]


def cluster_index(clusters: Sequence[Hashable], n: int) -> np.ndarray:
    """Clusters as numbers from 0, (n,) int64, in order of first occurrence.

    Raises:
        ValueError: There are not n.
    """
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} values")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Standard error of a mean whose values are correlated within clusters (Liang and Zeger 1986).

    Args:
        values: N.
        clusters: The cluster of each value.

    Returns:
        None if there are fewer than two clusters.
    """
    index, x = cluster_index(clusters, len(values)), np.asarray(values, dtype=np.float64)
    sums = np.bincount(index, x - x.mean()) if len(x) else x
    count = len(sums)
    return float(np.sqrt((sums**2).sum() * count / (count - 1))) / len(x) if count > 1 else None


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
        n: Rows, at least 1. Dependent observations, such as the tokens of one response, must form one row.
        confidence: In (0, 1).
        resamples: Samples drawn with replacement.
        seed: Of the draws.

    Returns:
        (low, high) over the resamples in which the statistic is defined. None if it is undefined in more than a tenth
        of them: the rest would be a biased sample.
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
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean of any numbers; for a proportion, use ``share_interval``.

    Args:
        values: At least one number.
        clusters: The cluster of each value, resampled as a whole; None: all independent.
        confidence, resamples, seed: As in ``bootstrap``.

    Returns:
        (low, high); both NaN if a value is.
    """
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any():
        return math.nan, math.nan
    return bootstrap_ratio(array, np.ones_like(array), clusters, confidence=confidence, resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators), the two of a row drawn together.

    Args:
        numerators, denominators: N >= 1 finite numbers each; the denominators are not negative.
        clusters: As in ``bootstrap_mean``.
        confidence, resamples, seed: As in ``bootstrap``.

    Returns:
        (low, high); None if more than a tenth of the resamples have only zeros as denominators.
    """
    rows = np.array(list(zip(numerators, denominators, strict=True)), dtype=np.float64).reshape(-1, 2)
    if clusters is not None and len(rows):
        index = cluster_index(clusters, len(rows))
        rows = np.stack([np.bincount(index, column) for column in rows.T], axis=1)

    def ratio(draws: np.ndarray) -> np.ndarray:
        above, below = rows[draws].sum(axis=1).T
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)

    return bootstrap(ratio, len(rows), confidence=confidence, resamples=resamples, seed=seed)
