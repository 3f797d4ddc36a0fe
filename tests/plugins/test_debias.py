"""Formulas of the labeler `distilled` against plain mathematics."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from trl_rlaif_distilled.debias import combine, mean_preference, preference, sigmoid

LOGITS = [-30.0, -3.0, -0.5, 0.0, 1e-9, 0.7, 4.0, 25.0]


def plain_sigmoid(x):
    return 1 / (1 + math.exp(-x))


def draw(one, two):
    """Log-probabilities of both candidates."""
    return tuple(math.log(p) if p else -math.inf for p in (one, two))


@pytest.mark.parametrize("x", LOGITS)
def test_sigmoid(x):
    assert sigmoid(x) == pytest.approx(plain_sigmoid(x), rel=1e-14)
    assert sigmoid(x) + sigmoid(-x) == pytest.approx(1, abs=1e-15)


def test_sigmoid_far_out():
    assert (sigmoid(1000.0), sigmoid(-1000.0)) == (1.0, 0.0)
    assert (sigmoid(math.inf), sigmoid(-math.inf)) == (1.0, 0.0)


@pytest.mark.parametrize(("one", "two"), [(0.6, 0.3), (0.01, 0.02), (0.5, 0.5), (1 - 1e-12, 1e-12)])
def test_preference_is_the_softmax_over_the_two_and_their_mass(one, two):
    found = preference(*draw(one, two))
    assert found.p == pytest.approx(one / (one + two), rel=1e-12)
    assert found.mass == pytest.approx(one + two, rel=1e-12)
    assert found.logit == pytest.approx(math.log(one / two), rel=1e-9)


def test_rounding_gives_no_mass_above_one():
    assert preference(math.log(0.5) + 1e-9, math.log(0.5) + 1e-9).mass == 1.0


def test_preference_of_candidates_that_are_both_unlikely():
    found = preference(-2000.0, -2001.0)
    assert found.p == pytest.approx(plain_sigmoid(1.0)) and found.mass == 0.0 and found.logit == 1.0


def test_preference_of_a_candidate_that_never_came():
    assert preference(*draw(0, 0.5)) == (-math.inf, 0.0, 0.5)
    assert preference(*draw(0.5, 0)) == (math.inf, 1.0, 0.5)


def test_mean_preference_averages_distributions():
    draws = [(0.6, 0.2), (0.1, 0.4), (0.3, 0.3)]
    p = fmean(one / (one + two) for one, two in draws)
    mass = fmean(one + two for one, two in draws)
    found = mean_preference("12", [draw(*pair) for pair in draws])
    assert found == pytest.approx((math.log(p / (1 - p)), p, mass), rel=1e-12)
    mapped = mean_preference("21", [draw(*pair) for pair in draws])
    assert mapped == pytest.approx((-found.logit, 1 - p, mass), rel=1e-12)


def test_one_distribution_is_its_own_mean():
    assert mean_preference("12", [draw(0.6, 0.3)]) == preference(*draw(0.6, 0.3))
    assert mean_preference("21", [draw(0.6, 0.3)]) == preference(*draw(0.3, 0.6))


def test_means_of_a_judge_that_is_sure():
    """1 - p would round to 0."""
    found = mean_preference("12", [(0.0, -50.0), (0.0, -60.0)])
    assert found.p == 1.0
    assert found.logit == pytest.approx(-math.log((math.exp(-50) + math.exp(-60)) / 2), rel=1e-12)
    assert mean_preference("21", [(0.0, -50.0), (0.0, -60.0)]).logit == pytest.approx(-found.logit, rel=1e-12)


def test_means_of_votes():
    """One rationale never led to 2, the other never to 1."""
    assert mean_preference("12", [draw(1, 0), draw(0, 1)])[:2] == (0.0, 0.5)
    assert mean_preference("12", [draw(1, 0), draw(0.5, 0)]) == (math.inf, 1.0, 0.75)
    assert mean_preference("21", [draw(1, 0), draw(1, 0)]) == (-math.inf, 0.0, 1.0)


@pytest.mark.parametrize("a", LOGITS)
@pytest.mark.parametrize("b", LOGITS)
def test_combine(a, b):
    assert combine([a, b], "mean_prob") == pytest.approx((plain_sigmoid(a) + plain_sigmoid(b)) / 2, rel=1e-12)
    assert combine([a, b], "mean_logit") == pytest.approx(plain_sigmoid((a + b) / 2), rel=1e-12)


@pytest.mark.parametrize("mode", ["mean_prob", "mean_logit"])
def test_combine_has_the_symmetries_of_a_preference(mode):
    for a in LOGITS:
        assert combine([a], mode) == pytest.approx(plain_sigmoid(a), rel=1e-12)
        assert combine([a, -a], mode) == pytest.approx(0.5, abs=1e-15)  # the orders contradict each other
        assert combine([a, a], mode) == pytest.approx(plain_sigmoid(a), rel=1e-12)  # and here they agree
        for b in LOGITS:
            assert combine([a, b], mode) == combine([b, a], mode)
            assert combine([a, b], mode) + combine([-a, -b], mode) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("bias", [0.5, 4.0, -8.0])
def test_mean_logit_cancels_an_additive_bias_and_mean_prob_does_not(bias):
    """The judge's log-odds of the first position are the truth plus a bias, which favors each response once."""
    truth = 2.0
    biased = (truth + bias, truth - bias)
    assert combine(biased, "mean_logit") == pytest.approx(sigmoid(truth), rel=1e-15)
    squeezed = combine(biased, "mean_prob")
    assert 0.5 < squeezed < sigmoid(truth) - 0.005


@pytest.mark.parametrize("far", [1000.0, math.inf])
def test_far_out_logits_stay_probabilities(far):
    for a in (far, -far):
        for b in (far, -far):
            assert combine([a, b], "mean_prob") == ((a > 0) + (b > 0)) / 2
            assert combine([a, b], "mean_logit") == ((a > 0) + (b > 0)) / 2
    assert combine([math.inf, -5.0], "mean_logit") == 1.0
