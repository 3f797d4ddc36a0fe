"""What training changed: forgetting curves, KL and length, by hand and against scipy's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from trl_rlaif.evaluation import (
    bootstrap_mean,
    bootstrap_ratio,
    compare_lengths,
    share_interval,
    summarize_curve,
    summarize_kl,
    wilson,
)

# ---- Forgetting -----------------------------------------------------------------------------------------

CURVE = [(0, 0.5, 1.2), (10, 0.55, 1.1), (20, 0.3, 1.5), (30, 0.3, 1.9), (40, 0.4, 1.4)]


def test_summarize_curve_by_hand():
    found = summarize_curve(CURVE)
    assert found["win_rate"] == pytest.approx(
        {"first": 0.5, "first_step": 0, "last": 0.4, "last_step": 40, "worst": 0.3, "worst_step": 20, "lost": 0.1,
         "lost_at_worst": 0.2}
    )  # fmt: skip
    assert found["nll"] == pytest.approx(
        {"first": 1.2, "first_step": 0, "last": 1.4, "last_step": 40, "worst": 1.9, "worst_step": 30, "lost": 0.2,
         "lost_at_worst": 0.7}
    )  # fmt: skip
    assert summarize_curve(CURVE[::-1]) == found


def test_a_curve_that_rises_has_lost_nothing():
    found = summarize_curve([(0, 0.5, 2.0), (5, 0.7, 1.5)])
    assert found["win_rate"]["lost"] == pytest.approx(-0.2) and found["nll"]["lost"] == pytest.approx(-0.5)
    assert (found["win_rate"]["lost_at_worst"], found["nll"]["lost_at_worst"]) == (0, 0)
    assert (found["win_rate"]["worst_step"], found["nll"]["worst_step"]) == (0, 0)


def test_curves_with_gaps():
    found = summarize_curve([(0, None, 1.0), (5, 0.4, None), (9, 0.3, 2.0)])
    assert (found["win_rate"]["first_step"], found["win_rate"]["lost"]) == (5, pytest.approx(0.1))
    assert found["nll"]["lost"] == 1.0
    assert summarize_curve([]) == summarize_curve([(0, None, None)], prompts=9) == {"win_rate": None, "nll": None}


def test_intervals_of_win_rates():
    found = summarize_curve(CURVE, prompts=60)["win_rate"]
    assert found["last_interval"] == wilson(24, 60)
    assert found["worst_interval"] == pytest.approx(wilson(18, 60, 0.99))  # one of five measurements
    assert found["worst_interval"][1] < 0.5 < found["last_interval"][1]


# ---- KL and length --------------------------------------------------------------------------------------


def responses(n=120, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, n)
    return rng.normal(0.05 * tokens, 0.5), tokens


def test_kl_per_response_and_per_token():
    kl, tokens = responses()
    found = summarize_kl(kl.tolist(), tokens.tolist())
    assert found["n"] == 120
    assert found["per_response"] == {"mean": pytest.approx(kl.mean()), "interval": bootstrap_mean(kl)}
    assert found["per_token"]["mean"] == pytest.approx(kl.sum() / tokens.sum())
    assert found["per_token"]["interval"] == bootstrap_ratio(kl, tokens)
    # Long responses weigh more than they would in a mean of means.
    assert summarize_kl([10.0, 0.0], [100, 1])["per_token"]["mean"] == pytest.approx(10 / 101)


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


def test_kl_without_tokens_and_of_wrong_input():
    assert summarize_kl([], []) is None and summarize_kl([0.0], [0]) is None
    with pytest.raises(ValueError):
        summarize_kl([0.1], [1, 2])
    with pytest.raises(ValueError):
        summarize_kl([0.1, 0.2], [0])


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
