"""Length bias of a win rate: the lengths themselves, and the length-controlled win rate."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from trl_rlaif.evaluation.intervals import bootstrap, bootstrap_mean, bootstrap_ratio, cluster_index, share_interval

# A fit has converged once its mean gradient is smaller than this; after this many steps it has failed.
_TOLERANCE, _STEPS = 1e-10, 100
# Added to the data for the interval, at equal length: two wins and two losses (Agresti and Coull 1998). Without them,
# 10 wins of 10 would have an interval of zero width.
_ADDED = np.array([1.0, 1.0, 0.0, 0.0])


def compare_lengths(
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Compare the lengths of A's and B's responses to the same prompts, which may bias a win rate.

    Args:
        lengths, other_lengths: N lengths of A's and of B's responses, both in characters or both in tokens.
        clusters: The cluster of each prompt, N entries, such as its text; None: all independent.
        seed: Of the bootstrap.

    Returns:
        ``mean`` and ``other_mean`` with ``interval`` and ``other_interval``; ``ratio`` of the means with
        ``ratio_interval`` (all 95%, bootstrap over the prompts); ``longer``, the fraction of prompts where A is longer,
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


def length_controlled_win_rate(
    p: Sequence[float],
    lengths: Sequence[int],
    other_lengths: Sequence[int],
    clusters: Sequence[Hashable] | None = None,
    *,
    penalty: float = 0.1,
    resamples: int = 2_000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Win rate of A over B as it would be at equal lengths (Dubois et al. 2024, "Length-Controlled AlpacaEval").

    p is fitted as sigmoid(a + b x) with x = tanh((length of A - length of B) / s), where s is the standard deviation
    of the differences, and evaluated at x = 0: sigmoid(a). So b absorbs a judge's length preference. The tanh keeps a
    few very long responses from dominating b. It is the paper's regression without the parts specific to AlpacaEval's
    instructions: a term for each one's difficulty, and GPT-4's terse and wordy answers, which regularize b. On the
    leaderboard's annotations the two differ by less than a percentage point for models that are longer on 40 to 60% of
    the prompts; if A is nearly always shorter and loses, AlpacaEval's stays closer to ``uncontrolled``.

    Args:
        p: N probabilities in [0, 1] that A is preferred, one per prompt, both orders already combined. They are fitted
            as given; for the length-controlled fraction of wins, pass 1, 0.5 and 0.
        lengths, other_lengths: N lengths of A's and of B's responses, both in characters (as in AlpacaEval) or tokens.
        clusters: The cluster of each prompt, N entries, such as its text; None: all independent.
        penalty: Adds penalty / 2 * b^2 to the negative log-likelihood; above 0. It keeps b finite if, on few prompts,
            one side wins whenever it is longer.
        resamples: Of the bootstrap; each is standardized and fitted again.
        seed: Of the bootstrap.

    Returns:
        ``win_rate`` and its ``interval`` (95%, bootstrap over prompts, with two wins and losses at equal length added;
        None for too few prompts); ``uncontrolled``, the mean of p, the result of the same fit without x; ``slope``, b:
        positive if the longer response is preferred; ``scale``, s; ``longer``, the fraction of prompts where A is
        longer (half for equal lengths): near 0 or 1, the win rate at equal lengths is extrapolated; ``n``. None without
        prompts, or if the difference is the same nonzero number on all of them: length and quality are then
        confounded.

    Raises:
        ValueError: A p is outside [0, 1], a length is not finite, or the penalty is not above 0 or the fit does not
            converge with it.
    """
    if not penalty > 0:
        raise ValueError("the penalty must be above 0: without one the fit may have no solution")
    preferred, difference = _checked(p, lengths, other_lengths)
    if not len(preferred) or (np.ptp(difference) == 0 and difference[0] != 0):
        return None
    once = np.ones((1, len(preferred)))
    (intercept,), (slope,) = _fit(_covariate(difference, once), preferred, once, penalty)
    if np.isnan(intercept):
        raise ValueError(f"the fit does not converge with a penalty of {penalty}: raise it")
    return {
        "win_rate": float(expit(intercept)),
        "interval": _interval(preferred, difference, clusters, penalty, resamples, seed),
        "uncontrolled": float(preferred.mean()),
        "slope": float(slope),
        "scale": float(_deviation(difference, once)[0, 0]),
        "longer": float((difference > 0).mean() + (difference == 0).mean() / 2),
        "n": len(preferred),
    }


def _checked(p: Sequence[float], lengths: Sequence[int], other_lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and length differences, (N,) each."""
    preferred, own, other = np.array([p, lengths, other_lengths], dtype=np.float64)
    if not np.isfinite(own - other).all() or not ((preferred >= 0) & (preferred <= 1)).all():
        raise ValueError("length control needs probabilities in [0, 1] and finite lengths")
    return preferred, own - other


def _interval(
    preferred: np.ndarray,
    difference: np.ndarray,
    clusters: Sequence[Hashable] | None,
    penalty: float,
    resamples: int,
    seed: int,
) -> tuple[float, float] | None:
    """Bootstrap over the clusters and ``_ADDED``, each weighted like an average cluster."""
    index = np.arange(len(preferred)) if clusters is None else cluster_index(clusters, len(preferred))
    count = int(index.max()) + 1
    outcomes = np.concatenate([preferred, _ADDED])

    def at_equal_length(draws: np.ndarray) -> np.ndarray:
        flat = draws + np.arange(len(draws))[:, None] * draws.shape[1]
        drawn = np.bincount(flat.ravel(), minlength=draws.size).reshape(draws.shape)
        weights = drawn[:, index].astype(np.float64)
        x = _covariate(difference, weights)
        added = drawn[:, count:] * (len(preferred) / count)
        x = np.concatenate([x, np.where(np.isnan(x[:, :1]), np.nan, np.zeros(added.shape))], axis=1)
        intercept, _ = _fit(x, outcomes, np.concatenate([weights, added], axis=1), penalty)
        return expit(intercept)

    return bootstrap(at_equal_length, count + len(_ADDED), resamples=resamples, seed=seed)


def _deviation(difference: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """From (N,) differences and (B, N) resampling weights to the resamples' standard deviations, (B, 1); or 0."""
    n = weights.sum(axis=1, keepdims=True)
    mean = (weights * difference).sum(axis=1, keepdims=True) / np.maximum(1, n)
    squares = (weights * (difference - mean) ** 2).sum(axis=1, keepdims=True)
    return np.sqrt(squares / np.maximum(1, n - 1))


def _covariate(difference: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """From (N,) differences to x in [-1, 1], (B, N). Not centered: 0 is equal length. NaN in rows without a fit."""
    drawn = weights > 0
    lowest = np.where(drawn, difference, np.inf).min(axis=1)
    alike = lowest == np.where(drawn, difference, -np.inf).max(axis=1)
    scale, scaled = _deviation(difference, weights), np.zeros(weights.shape)
    np.divide(difference, scale, out=scaled, where=(scale > 0) & ~alike[:, None])
    scaled[alike & (lowest != 0)] = np.nan
    return np.tanh(scaled)


def _fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope, (B,) each, of B weighted logistic fits of y, (N,), to x, (B, N), by Newton's method.

    Both are NaN if x has NaN, or if the method does not converge.
    """
    fitted = np.zeros((2, len(x)))
    fitted[:, np.isnan(x).any(axis=1)] = np.nan
    active = np.flatnonzero(~np.isnan(fitted[0]))
    for _ in range(_STEPS):
        x_, w, (a, b) = x[active], weights[active], fitted[:, active]
        q = expit(a[:, None] + b[:, None] * x_)
        missing, weight = w * (y - q), w * q * (1 - q)
        up_a, up_b = missing.sum(axis=1), (missing * x_).sum(axis=1) - penalty * b
        going = np.maximum(abs(up_a), abs(up_b)) > _TOLERANCE * x.shape[1]
        if not going.any():
            break
        h_aa, h_ab = weight.sum(axis=1), (weight * x_).sum(axis=1)
        h_bb = (weight * x_**2).sum(axis=1) + penalty
        step = np.stack([h_bb * up_a - h_ab * up_b, h_aa * up_b - h_ab * up_a]) / (h_aa * h_bb - h_ab**2)
        fitted[:, active[going]] += step[:, going]
        active = active[going]
    else:
        fitted[:, active] = np.nan
    return fitted[0], fitted[1]
