"""Lengths of two policies' responses, by hand and against scipy's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from trl_rlaif.evaluation import (
    bootstrap_mean,
    bootstrap_ratio,
    compare_lengths,
    share_interval,
)


def responses(n=120, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, n)
    return rng.normal(0.05 * tokens, 0.5), tokens


def test_the_interval_of_a_ratio_is_scipys():
    kl, tokens = responses(seed=1)
    expected = bootstrap(
        (kl, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert bootstrap_ratio(kl, tokens) == pytest.approx((expected.low, expected.high), abs=width / 20)
    apart = bootstrap_ratio(kl, np.random.default_rng(2).permutation(tokens))
    assert apart[1] - apart[0] > 1.3 * width  # both columns of a row are drawn together


def test_lengths_by_hand():
    a, b = [10, 20, 30, 40], [10, 10, 40, 5]
    found = compare_lengths(a, b)
    assert (found["mean"], found["other_mean"], found["n"]) == (25, 16.25, 4)
    assert (found["interval"], found["other_interval"]) == (bootstrap_mean(a), bootstrap_mean(b))
    assert found["ratio"] == pytest.approx(100 / 65) and found["ratio_interval"] == bootstrap_ratio(a, b)
    assert (found["longer"], found["longer_interval"]) == (2.5 / 4, share_interval([0.5, 1, 0, 1]))


def test_lengths_that_are_all_alike_or_none():
    same = compare_lengths([7, 8], [7, 8])
    assert (same["ratio"], same["ratio_interval"], same["longer"]) == (1, (1, 1), 0.5)
    silent = compare_lengths([3, 4], [0, 0])
    assert (silent["ratio"], silent["ratio_interval"], silent["longer"]) == (None, None, 1)
    assert compare_lengths([], []) is None
    with pytest.raises(ValueError):
        compare_lengths([1], [1, 2])
