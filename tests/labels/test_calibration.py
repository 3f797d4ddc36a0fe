"""Calibration against an optimizer in float64, on data whose truth is known, and with too little data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from trl_rlaif import UserError
from trl_rlaif.labels.calibration import FOLDS, MIN_PAIRS, Calibration, check_choices, held_out
from trl_rlaif.measures import agreement, calibration_error


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def simulate(n, *, temperature, bias, seed=0, orders=("12", "21")):
    """Labels of a judge whose log-odds are ``temperature`` times too large, and ``bias`` larger for what is first.

    People choose by the truth, once for each pair.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, n)
    human = np.where(rng.random(n) < sigmoid(truth), 1, 2).tolist()
    noise = rng.normal(0, 0.1, (n, 2))  # the orders of a pair do not say quite the same
    l_12, l_21 = temperature * (truth + noise[:, 0]) + bias, temperature * (truth + noise[:, 1]) - bias
    shown = {"12": sigmoid(l_12), "21": sigmoid(l_21)}
    rows = [
        {f"p_{order}": float(shown[order][i]) if order in orders else None for order in shown}
        | {"p": float(sigmoid((l_12[i] + l_21[i]) / 2))}
        for i in range(n)
    ]
    return rows, human


def loss(weights, rows, human):
    """Minus the log-likelihood of the choices, written out."""
    scale, bias = weights
    total = 0.0
    for row, choice in zip(rows, human, strict=True):
        orders = [(row["p_12"], 1), (row["p_21"], -1)]
        observed = [(p, first) for p, first in orders if p is not None] or [(row["p"], 0)]
        for p, first in observed:
            logit = scale * (math.log(p) - math.log1p(-p)) - bias * first
            total += np.logaddexp(0, -logit if choice == 1 else logit)
    return total


@pytest.mark.parametrize("orders", [("12", "21"), ("12",), ("21",), ()])
@pytest.mark.parametrize(("n", "temperature", "bias"), [(MIN_PAIRS, 1.0, 0.0), (60, 3.0, 1.5), (200, 0.4, -2.0)])
def test_it_is_the_maximum_of_the_likelihood(n, temperature, bias, orders):
    rows, human = simulate(n, temperature=temperature, bias=bias, orders=orders)
    found = Calibration.fit(rows, human)
    wanted = minimize(loss, [1.0, 0.0], args=(rows, human), method="Nelder-Mead",
                      options={"xatol": 1e-10, "fatol": 1e-13, "maxiter": 10_000}).x  # fmt: skip
    assert found.scale == pytest.approx(wanted[0], abs=1e-6)
    if orders:
        assert found.bias == pytest.approx(wanted[1], abs=1e-6)
    else:
        assert found.bias == 0  # without orders nothing is known of a position


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (4.0, 3.0), (0.5, -1.0)])
def test_it_finds_the_temperature_and_the_bias_of_a_judge(temperature, bias):
    n = 20_000
    rows, human = simulate(n, temperature=temperature, bias=bias, seed=3)
    found = Calibration.fit(rows, human)
    # Cramer-Rao for one observation a pair: the second order of a pair tells nothing new of the scale.
    truth = np.random.default_rng(3).normal(0, 1.5, n)
    variance = sigmoid(truth) * (1 - sigmoid(truth))
    error = 1 / math.sqrt(np.sum(variance * truth**2))
    noise = 0.1**2 / 1.5**2  # noise in a regressor pulls its weight down by this share
    assert found.scale * temperature == pytest.approx(1, abs=4 * error + noise)
    # The bias falls on both orders of a pair with opposite signs: scale times it is what is to be taken off.
    assert found.bias == pytest.approx(bias / temperature, abs=4 * error * max(1, abs(bias) / temperature) + noise)


def test_it_makes_labels_right_as_often_as_they_say():
    rows, human = simulate(4000, temperature=5.0, bias=2.0, seed=1)
    fresh, choices = simulate(4000, temperature=5.0, bias=2.0, seed=2)
    fitted = Calibration.fit(rows, human)
    assert calibration_error([row["p"] for row in fresh], choices) > 0.1
    assert calibration_error([fitted.apply(row) for row in fresh], choices) < 0.03


def test_apply_by_hand():
    calibration = Calibration(scale=0.5, bias=0.25)
    logit = math.log(0.8 / 0.2)
    assert calibration.apply({"p_12": 0.8, "p_21": 0.2, "p": 0.9}) == pytest.approx(0.5, abs=1e-15)
    assert calibration.apply({"p_12": 0.8, "p_21": None, "p": 0.9}) == pytest.approx(sigmoid(0.5 * logit - 0.25))
    assert calibration.apply({"p_12": None, "p_21": 0.8, "p": 0.9}) == pytest.approx(sigmoid(0.5 * logit + 0.25))
    assert calibration.apply({"p_12": None, "p_21": None, "p": 0.8}) == pytest.approx(sigmoid(0.5 * logit))
    assert calibration.apply({"p": 0.8}) == pytest.approx(sigmoid(0.5 * logit))
    both = sigmoid((0.5 * (math.log(0.9 / 0.1) + logit)) / 2)
    assert calibration.apply({"p_12": 0.9, "p_21": 0.8, "p": 0.1}) == pytest.approx(both)


def test_a_calibration_that_changes_nothing_is_the_mean_of_the_log_odds():
    assert Calibration().apply({"p_12": 0.9, "p_21": 0.6, "p": None}) == pytest.approx(
        sigmoid((math.log(9) + math.log(1.5)) / 2), rel=1e-14
    )


def test_labels_that_are_quite_sure_stay_probabilities():
    for p in (0.0, 1.0, 5e-324):
        assert 0 <= Calibration(scale=40.0, bias=1.0).apply({"p_12": p, "p_21": p}) <= 1
    rows, human = simulate(40, temperature=1.0, bias=0.0)
    rows[0] |= {"p_12": 1.0, "p_21": 0.0}
    assert math.isfinite(Calibration.fit(rows, human).scale)


@pytest.mark.parametrize(
    "human", [[], [1, 2] * 9, [1] * 40, [2] * 40, [1] * 39 + [2]], ids=["none", "18", "only 1", "only 2", "one 2"]
)
def test_too_little_is_the_users_error(human):
    rows, _ = simulate(len(human), temperature=1.0, bias=0.0)
    for call in (lambda: check_choices(human), lambda: Calibration.fit(rows, human)):
        with pytest.raises(UserError, match="too few to calibrate with.*label.calibration"):
            call()


@pytest.mark.parametrize("human", [[1, 2] * 10, [1] * 18 + [2] * 2, [2] * 38 + [1] * 2])
def test_enough_is_enough_also_for_the_folds(human):
    """Twenty pairs leave sixteen to fit to, with both choices among them."""
    check_choices(human)
    rows, _ = simulate(len(human), temperature=2.0, bias=0.5)
    for seed in range(5):
        assert held_out(rows, human, seed=seed)["after"]["agreement"]["n"] == len(human)


def test_held_out_never_fits_to_what_it_tests(monkeypatch):
    rows, human = simulate(33, temperature=2.0, bias=0.5)
    for i, row in enumerate(rows):
        row["number"] = i
    fits, tested = [], {}
    fit, apply = Calibration._likeliest.__func__, Calibration.apply

    def spy_fit(cls, rows, human):
        fitted = fit(cls, rows, human)
        fits.append((fitted, {row["number"] for row in rows}))
        assert human == [choices[row["number"]] for row in rows]
        return fitted

    def spy_apply(self, row):
        seen = next(numbers for fitted, numbers in fits if fitted is self)
        assert row["number"] not in seen
        assert row["number"] not in tested
        tested[row["number"]] = apply(self, row)
        return tested[row["number"]]

    choices = list(human)
    monkeypatch.setattr(Calibration, "_likeliest", classmethod(spy_fit))
    monkeypatch.setattr(Calibration, "apply", spy_apply)
    result = held_out(rows, human, seed=0)
    assert len(fits) == FOLDS and sorted(tested) == list(range(33))
    assert all(len(numbers) >= 33 - math.ceil(33 / FOLDS) for _, numbers in fits)
    after, before = [tested[i] for i in range(33)], [row["p"] for row in rows]
    assert result == {
        "before": {"agreement": agreement(before, human), "ece": calibration_error(before, human)},
        "after": {"agreement": agreement(after, human), "ece": calibration_error(after, human)},
    }


def test_held_out_repeats_with_its_seed():
    rows, human = simulate(50, temperature=2.0, bias=0.5)
    assert held_out(rows, human, seed=1) == held_out(rows, human, seed=1) != held_out(rows, human, seed=2)
