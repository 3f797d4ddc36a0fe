"""Evaluation metrics against scipy's intervals and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest

from trl_rlaif.evaluation import (
    agreement,
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    position_bias,
    share_interval,
    summarize_mass,
    wilson,
    win_rate,
)

# ---- Intervals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (3, 7), (50, 100), (199, 200), (20, 20)])
def test_wilson_is_scipys(k, n, confidence):
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_is_at_95_percent_and_takes_halves():
    expected = binomtest(3, 10).proportion_ci(0.95, method="wilson")
    assert wilson(3, 10) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(3.5, 10)
    assert wilson(3, 10)[0] < low < wilson(4, 10)[0] and wilson(3, 10)[1] < high < wilson(4, 10)[1]


def test_wilson_stays_a_share():
    for n in (1, 5, 10**6):
        assert 0 <= wilson(0, n)[0] < wilson(0, n)[1] <= 1
        assert 0 <= wilson(n, n)[0] < wilson(n, n)[1] <= 1


def test_wilson_without_trials_is_an_error():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


SAMPLES = {
    "normal": np.random.default_rng(1).normal(3.0, 2.0, 80),
    "skewed": np.random.default_rng(2).exponential(1.0, 50),
    "wins": np.random.default_rng(3).choice([0.0, 0.5, 1.0], 60),
}


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
def test_bootstrap_is_scipys_within_its_noise(values, confidence):
    draws = {"n_resamples": 10_000, "rng": np.random.default_rng(0), "confidence_level": confidence}
    expected = stats.bootstrap((values,), np.mean, method="percentile", **draws).confidence_interval
    # Standard error of a quantile of 10,000 nearly normal draws, times sqrt(2), as both sides are random.
    tail, spread = (1 - confidence) / 2, values.std() / math.sqrt(len(values))
    z = (expected.high - expected.low) / 2 / spread
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / spread
    noise = math.sqrt(2 * tail * (1 - tail) / 10_000) / density
    grain = 0.5 / len(values)  # means of multiples of 1/2 are on a grid
    found = bootstrap_mean(values.tolist(), confidence=confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=5 * noise + grain)
    assert 5 * noise + grain < (expected.high - expected.low) / 5


def test_bootstrap_repeats_with_its_seed():
    values = SAMPLES["normal"]
    assert bootstrap_mean(values) == bootstrap_mean(list(values)) != bootstrap_mean(values, seed=1)


def test_bootstrap_of_one_value_or_equal_values_is_a_point():
    assert bootstrap_mean([0.25]) == (0.25, 0.25)
    assert bootstrap_mean([1] * 9) == (1.0, 1.0)


def test_bootstrap_of_many_values_is_drawn_in_parts():
    """This bounds the memory and does not affect the interval."""
    values = np.random.default_rng(4).normal(0, 1, 60_000)
    low, high = bootstrap_mean(values, resamples=200)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(60_000), rel=0.3)


def test_bootstrap_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ratio([], [])


def test_bootstrap_of_a_mean_that_is_nan_is_nan():
    assert all(math.isnan(end) for end in bootstrap_mean([0.1] * 99 + [math.nan]))


def test_bootstrap_of_any_statistic_is_scipys_within_its_noise():
    values = SAMPLES["skewed"]
    expected = stats.bootstrap((values,), np.std, method="percentile", rng=np.random.default_rng(0))
    low, high = expected.confidence_interval
    found = bootstrap(lambda draws: values[draws].std(axis=1), len(values))
    assert found == pytest.approx((low, high), abs=(high - low) / 20)


def test_resamples_without_a_value_are_left_out_while_they_are_few():
    values = np.array([1.0] * 3 + [0.0] * 3)  # 1 in 64 resamples has no 1

    def share_of_ones(draws):
        ones = values[draws].sum(axis=1)
        return np.where(ones > 0, 1.0, np.nan)

    assert bootstrap(share_of_ones, 6) == (1.0, 1.0)
    values[1:3] = 0  # now a third have none
    assert bootstrap(share_of_ones, 6) is None


# ---- Labels ---------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    p = [0.9, 0.2, 0.7, 0.4, 0.5, 0.99, 0.01]
    human = [1, 2, 2, 1, 1, 0, None]
    found = agreement(p, human)
    assert found == {
        "rate": 2.5 / 5, "interval": share_interval([1, 1, 0, 0, 0.5]), "n": 5, "ties": 1, "rate_with_ties": 3 / 6,
    }  # fmt: skip


def test_agreement_is_a_matter_of_the_side_alone():
    assert agreement([0.51, 0.49], [1, 2])["rate"] == 1.0
    assert agreement([0.51, 0.49], [2, 1])["rate"] == 0.0
    assert agreement([0.5, 0.5], [2, 1])["rate"] == 0.5


@pytest.mark.parametrize(("p", "human"), [([], []), ([0.9], [None]), ([0.9, 0.1], [0, 0])])
def test_agreement_with_nobody_is_none(p, human):
    assert agreement(p, human) is None


def test_agreement_wants_a_choice_for_each_label():
    with pytest.raises(ValueError):
        agreement([0.5, 0.6], [1])


def test_position_bias_by_hand():
    # Both are probabilities of response_1. The first position wins both times if p_12 > 0.5 > p_21.
    p_12 = [0.9, 0.8, 0.2, 0.9, 0.1, 0.5, 0.9]
    p_21 = [0.1, 0.4, 0.7, 0.6, 0.3, 0.2, 0.5]
    found = position_bias(p_12, p_21)
    assert found == {"rate": 3 / 7, "interval": pytest.approx(wilson(3, 7), abs=1e-12), "n": 7, "first": 2, "second": 1}


def test_position_bias_of_judges_that_know_one_answer():
    assert position_bias([0.9] * 4, [0.2] * 4)["first"] == 4  # always "1"
    assert position_bias([0.1] * 4, [0.8] * 4)["second"] == 4  # always "2"
    assert position_bias([0.9, 0.1], [0.9, 0.1])["rate"] == 0.0  # the same response in either position
    assert position_bias([0.5], [0.5])["rate"] == 0.0
    assert position_bias([], []) is None


def test_summarize_mass_by_hand():
    found = summarize_mass([0.9, 0.5, 0.1, 0.3])
    assert found == {"mean": pytest.approx(0.45), "min": 0.1, "low": 2}  # 0.5 is not low
    assert summarize_mass([0.9, 0.5, 0.1, 0.3], low=0.2)["low"] == 1
    assert summarize_mass([]) is None


# ---- Wins -----------------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    p = [0.9, 0.51, 0.5, 0.2, 0.0, 1.0]
    found = win_rate(p)
    points = [1.0, 1.0, 0.5, 0.0, 0.0, 1.0]
    assert found["win_rate"] == pytest.approx(3.5 / 6)
    assert (found["wins"], found["ties"], found["losses"]) == (3, 1, 2)
    assert found["interval"] == share_interval(points)
    assert found["interval"][0] <= found["win_rate"] <= found["interval"][1]
    prompts = ["x", "x", "y", "y", "z", "z"]
    assert win_rate(p, prompts)["interval"] == share_interval(points, prompts)


def test_win_rates_of_both_sides_add_up():
    p = np.random.default_rng(5).choice([0.1, 0.5, 0.8], 40)
    one, other = win_rate(p), win_rate(1 - p)
    assert one["win_rate"] + other["win_rate"] == pytest.approx(1)
    assert (one["wins"], one["ties"]) == (other["losses"], other["ties"])


@pytest.mark.parametrize("nothing", [[], (), np.array([])])
def test_win_rate_of_nothing_is_an_error(nothing):
    with pytest.raises(ValueError, match="at least one comparison"):
        win_rate(nothing)


def test_win_rate_of_ties_only():
    found = win_rate([0.5, 0.5, 0.5 + 1e-12])  # the rounding error of a mean over both orders is not a preference
    assert found == {"win_rate": 0.5, "interval": share_interval([0.5] * 3), "wins": 0, "ties": 3, "losses": 0}
    assert win_rate([0.5 + 1e-6])["wins"] == 1
