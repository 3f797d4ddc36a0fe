"""Confidence intervals of proportions: against scipy's Wilson interval, and their coverage, exact where computable."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from trl_rlaif.evaluation import (
    agreement,
    bootstrap_mean,
    cohen_kappa,
    harmless_rate,
    pairwise_accuracy,
    position_bias,
    share_interval,
    win_rate,
)

NUMBERS, SHARES = (10, 20, 40, 200), (0.5, 0.9, 0.95)


def wins(k, n):
    return [1.0] * k + [0.0] * (n - k)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (10, 10), (3, 7), (50, 100), (199, 200)])
def test_of_wins_and_losses_it_is_wilsons(k, n, confidence):
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    for clusters in (None, list(range(n))):
        found = share_interval(wins(k, n), clusters, confidence=confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("measure", [
    lambda: win_rate([0.9] * 10)["interval"],
    lambda: agreement([0.9] * 10, [1] * 10)["interval"],
    lambda: pairwise_accuracy([1.0] * 10, [0.0] * 10)["interval"],
    lambda: harmless_rate([True] * 10)["interval"],
    lambda: position_bias([0.9] * 10, [0.1] * 10)["interval"],
    lambda: cohen_kappa([1, 2] * 5, [1, 2] * 5)["interval"],
])  # fmt: skip
def test_ten_of_ten_is_not_certain(measure):
    low, high = measure()
    assert (low, high) == (pytest.approx(binomtest(10, 10).proportion_ci(method="wilson").low, abs=1e-12), 1)
    assert 0.72 < low < 0.73


def test_clusters_that_are_all_alike_count_as_one_point_each():
    """Four identical outcomes per prompt: Wilson's interval over prompts, up to n / (n - 1) in the variance."""
    outcomes = wins(30, 50)
    found = share_interval(np.repeat(outcomes, 4).tolist(), np.repeat(np.arange(50), 4).tolist())
    assert found == pytest.approx(share_interval(outcomes), abs=0.003)
    sure = share_interval([1.0] * 40, np.repeat(np.arange(10), 4).tolist())
    assert sure == pytest.approx(share_interval([1.0] * 10), abs=1e-12)


def test_one_cluster_tells_as_much_as_one_point():
    assert share_interval(wins(6, 8), ["x"] * 8) == pytest.approx(share_interval_of(0.75, 0.75 * 0.25, 1), abs=1e-12)


def share_interval_of(share, variance, n, z=1.959963984540054):
    """Wilson's interval, written as z^2 additional observations with mean 1/2 and variance 1/4."""
    centre, half = n * share + z**2 / 2, z * np.sqrt(n * variance + z**2 / 4)
    return (centre - half) / (n + z**2), (centre + half) / (n + z**2)


def test_ties_narrow_it_as_their_variance_does():
    for points in ([0.5] * 10, [1.0] * 3 + [0.5] * 5 + [0.0] * 2):
        expected = share_interval_of(np.mean(points), np.var(points), 10)
        assert share_interval(points) == pytest.approx(expected, abs=1e-12)
    low, high = share_interval([0.5] * 10)
    assert low < 0.37 and high > 0.63  # ten ties do not rule out wins and losses


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match="at least one point"):
        share_interval([])
    for point in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
            share_interval([0.5, point])
    with pytest.raises(ValueError, match="1 clusters for 2 values"):
        share_interval([0.5, 0.5], ["x"])
    with pytest.raises(ValueError, match="1 clusters for 2 values"):
        bootstrap_mean([0.5, 0.5], ["x"])


def test_a_bootstrap_of_clusters_draws_them_whole():
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(30), 4)
    values = rng.normal(0, 1, 30)[of]
    assert bootstrap_mean(values, of.tolist()) == pytest.approx(bootstrap_mean(values[::4]), abs=1e-12)
    low, high = bootstrap_mean(values)
    assert 0.3 < (high - low) / np.ptp(bootstrap_mean(values, of.tolist())) < 0.7


# ---- Coverage -------------------------------------------------------------------------------------------


def exact_coverage(n, shares):
    """Coverage of ``win_rate``'s interval on n independent wins and losses, for each true share."""
    found = [win_rate(wins(k, n))["interval"] for k in range(n + 1)]
    return np.array([
        binom.pmf(range(n + 1), n, p)[[low <= p <= high for low, high in found]].sum() for p in np.atleast_1d(shares)
    ])  # fmt: skip


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("n", NUMBERS)
def test_it_covers_95_percent(n, share):
    """Mean coverage over the true shares within 0.05 of this one.

    At a single share, coverage jumps with n because counts are integers: at n = 10 and 0.95, it can be 91.4% or 98.8%,
    but nothing in between.
    """
    around = np.linspace(share - 0.05, min(1.0, share + 0.05), 51)
    assert 0.93 <= exact_coverage(n, around).mean() <= 0.97
    assert 0.91 <= exact_coverage(n, share)[0] <= 0.98


def clustered(rng, prompts, share, correlation):
    """Wins on four pairs per prompt, with beta-distributed win probabilities of the prompts."""
    spread = 1 / correlation - 1
    chance = rng.beta(share * spread, (1 - share) * spread, prompts)
    return (rng.random((prompts, 4)) < chance[:, None]).astype(float).ravel().tolist()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("prompts", NUMBERS)
def test_it_covers_95_percent_with_four_pairs_a_prompt(prompts, share):
    """Pairs of a prompt have a correlation of 0.5; treated as independent, they would give a coverage of 78%."""
    rng, of = np.random.default_rng(prompts), np.repeat(np.arange(prompts), 4).tolist()
    covered, naive = [], []
    for _ in range(1000):
        true = rng.uniform(share - 0.05, min(1.0, share + 0.05))
        outcomes = clustered(rng, prompts, true, 0.5)
        for hits, clusters in ((covered, of), (naive, None)):
            low, high = win_rate(outcomes, clusters)["interval"]
            hits.append(low <= true <= high)
    # Three standard errors over 1,000 draws are 0.02; the draws are seeded.
    assert 0.93 <= np.mean(covered) <= 0.975
    assert np.mean(naive) < 0.90


@pytest.mark.parametrize("alike", [0.5, 0.9])
@pytest.mark.parametrize("n", [20, 50])
def test_kappas_interval_covers(n, alike):
    """Two judges agree on a share ``alike`` of the pairs and vote by chance on the rest, so that it is their kappa."""
    rng, covered = np.random.default_rng(n), []
    for _ in range(500):
        first = rng.integers(1, 3, n)
        second = np.where(rng.random(n) < alike, first, rng.integers(1, 3, n))
        low, high = cohen_kappa(first.tolist(), second.tolist())["kappa_interval"]
        covered.append(low <= alike <= high)
    assert 0.88 <= np.mean(covered) <= 0.99  # a percentile bootstrap: 0.58 at n = 20 and 0.9
