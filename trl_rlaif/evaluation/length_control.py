"""What a win rate owes to length: the lengths themselves, and what is left of it at equal ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from trl_rlaif.evaluation.intervals import bootstrap, bootstrap_mean, bootstrap_ratio, cluster_index, share_interval

# A fit is done where its mean gradient is smaller than this; one that is not after so many steps has failed.
_TOLERANCE, _STEPS = 1e-10, 100
# What the interval adds to the data, at equal length: two wins and two losses (Agresti and Coull 1998). Without them 10
# wins of 10 would have an interval of no width.
_ADDED = np.array([1.0, 1.0, 0.0, 0.0])


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
    of the differences, and read at x = 0: sigmoid(a). So a judge's taste for length goes into b. The tanh keeps a few
    very long responses from deciding on b. It is the paper's regression less what only AlpacaEval's own instructions
    have: a term for the difficulty of each, and GPT-4's terse and wordy answers to them, which regularize b. On the
    leaderboard's annotations the two differ by less than a percentage point for models that are the longer one on 40 to
    60% of the prompts; where A nearly always is shorter and loses, AlpacaEval's stays nearer to ``uncontrolled``.

    Args:
        p: N probabilities in [0, 1] that A is preferred, one a prompt, both orders already joined. They are fitted as
            they are; for the length-controlled share of wins give 1, 0.5 and 0.
        lengths, other_lengths: N lengths of A's and of B's responses, characters (as in AlpacaEval) or tokens alike.
        clusters: What each prompt depends on, N entries, such as its text; None: on nothing.
        penalty: Adds penalty / 2 * b^2 to the negative log-likelihood, above 0. It matters where few prompts would
            let b run to infinity, since one side wins whenever it is the longer one.
        resamples: Of the bootstrap; each is standardized and fitted anew.
        seed: Of the bootstrap.

    Returns:
        ``win_rate`` and its ``interval`` (95%, bootstrap over prompts, with two wins and losses at equal length added;
        None for too few prompts); ``uncontrolled``, the mean of p, which the same fit gives without x; ``slope``, b:
        positive where the longer response is preferred; ``scale``, s; ``longer``, the share of prompts on which A is
        longer (half for equal lengths): near 0 or 1 the win rate at equal lengths is extrapolated; ``n``. None without
        prompts, and where the difference is the same on all of them and not zero: length and quality cannot then be
        told apart.

    Raises:
        ValueError: A p outside [0, 1], a length that is not finite, or a penalty with which the fit does not converge
            or that is not above 0.
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
    """Probabilities and differences of the lengths, (N,) each."""
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
    """Bootstrap over the clusters and ``_ADDED``, each of which weighs as much as a cluster does on average."""
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
    """(N,) differences, drawn as often as (B, N) weights say, to their samples' standard deviations, (B, 1); or 0."""
    n = weights.sum(axis=1, keepdims=True)
    mean = (weights * difference).sum(axis=1, keepdims=True) / np.maximum(1, n)
    squares = (weights * (difference - mean) ** 2).sum(axis=1, keepdims=True)
    return np.sqrt(squares / np.maximum(1, n - 1))


def _covariate(difference: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N,) differences to x in [-1, 1], (B, N). Not centred: 0 stays equal length. NaN in rows without a fit."""
    drawn = weights > 0
    lowest = np.where(drawn, difference, np.inf).min(axis=1)
    alike = lowest == np.where(drawn, difference, -np.inf).max(axis=1)
    scale, scaled = _deviation(difference, weights), np.zeros(weights.shape)
    np.divide(difference, scale, out=scaled, where=(scale > 0) & ~alike[:, None])
    scaled[alike & (lowest != 0)] = np.nan
    return np.tanh(scaled)


def _fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope, (B,) each, of B weighted logistic fits of y, (N,), to x, (B, N), by Newton's method.

    Both are NaN where x has NaN, and where the method does not converge.
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
