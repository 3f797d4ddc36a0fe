"""Calibration against scipy's optimizer in float64, on data with known truth, and with too little data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import log_loss

from trl_rlaif import UserError
from trl_rlaif.evaluation import agreement, calibration_error
from trl_rlaif.labels import calibration
from trl_rlaif.labels.calibration import FOLDS, MIN_PAIRS, REPEATS, Calibration, check_choices, cross_validate

ORDERS = ("p_12", "p_21", "p")


def simulate(n, *, temperature, bias, seed=0, orders=("12", "21"), mean_prob=False):
    """Labels of a judge: true log-odds times ``temperature``, plus ``bias`` for the response shown first.

    Human choices are drawn from the truth, one per pair.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, n)
    human = np.where(rng.random(n) < expit(truth), 1, 2).tolist()
    noise = rng.normal(0, 0.1, (n, 2))  # the two orders of a pair differ slightly
    shown = {"12": temperature * (truth + noise[:, 0]) + bias, "21": temperature * (truth + noise[:, 1]) - bias}
    asked = [shown[order] for order in orders] or [temperature * truth]
    joined = np.mean(expit(asked), axis=0) if mean_prob else expit(np.mean(asked, axis=0))
    rows = [
        {f"p_{order}": float(expit(shown[order][i])) if order in orders else None for order in shown}
        | {"p": float(joined[i])}
        for i in range(n)
    ]
    return rows, human


def columns(rows):
    """The rows as one dict of arrays."""
    return {key: None if rows[0].get(key) is None else np.array([row[key] for row in rows]) for key in ORDERS}


def joined(row, scale, bias, mean_prob):
    """The calibrated label by its formula, for a row or for ``columns``."""
    orders = [(row["p_12"], 1), (row["p_21"], -1)]
    known = [(p, first) for p, first in orders if p is not None]
    if len(known) == 2 and not mean_prob or not known:
        return expit(scale * logit(row["p"]))
    return np.mean([expit(scale * logit(p) - bias * first) for p, first in known], axis=0)


def posterior(weights, labels, human, mean_prob):
    """The negative log posterior (likelihood and both priors), with scipy's and scikit-learn's functions."""
    p = joined(labels, math.exp(weights[0]), weights[1], mean_prob)
    likelihood = -len(human) * log_loss(np.array(human) == 1, p)
    return -likelihood - norm.logpdf(weights[0], 0, math.log(2)) - norm.logpdf(weights[1], 0, 1)


@pytest.mark.parametrize("orders", [("12", "21"), ("12",), ("21",), ()])
@pytest.mark.parametrize("mean_prob", [False, True])
@pytest.mark.parametrize(("n", "temperature", "bias"), [(MIN_PAIRS, 1.0, 0.0), (60, 3.0, 1.5), (200, 0.4, -2.0)])
def test_it_is_the_maximum_of_the_posterior(n, temperature, bias, orders, mean_prob):
    rows, human = simulate(n, temperature=temperature, bias=bias, orders=orders, mean_prob=mean_prob)
    found = Calibration.fit(rows, human, mean_prob=mean_prob)
    wanted = minimize(posterior, [0.0, 0.0], args=(columns(rows), human, mean_prob), method="Nelder-Mead",
                      options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 10_000}).x  # fmt: skip
    assert (math.log(found.scale), found.bias) == pytest.approx(tuple(wanted), abs=1e-5)
    if not orders or (len(orders) == 2 and not mean_prob):
        assert found.bias == 0  # it cancels, or no position is known
    # In the mean of both probabilities, a bias of the opposite sign gives the same labels.
    assert found.has_bias(rows) == (len(orders) == 1)
    assert found.apply(rows[0]) == pytest.approx(joined(rows[0], found.scale, found.bias, mean_prob), abs=1e-12)


@pytest.mark.parametrize("truth", [0.51, 0.57, 0.62, 0.67])
def test_no_judge_is_turned_around(truth):
    """At any of these rates of agreement with people, fitting on 20 pairs never gives a negative scale."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        human = rng.permutation([1, 2] * 10)
        sizes = abs(rng.normal(0, 2, 20))
        logits = np.where((human == 1) == (rng.random(20) < truth), sizes, -sizes)
        rows = [{"p": float(expit(x)), "p_12": float(expit(x + 1)), "p_21": float(expit(x - 1))} for x in logits]
        fitted = Calibration.fit(rows, human.tolist())
        assert 0.05 < fitted.scale < 5
        assert all((fitted.apply(row) > 0.5) == (row["p"] > 0.5) for row in rows)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.999])
def test_pairs_that_are_all_right_give_a_modest_scale(p):
    """Without a prior, separable pairs would give an unbounded scale."""
    human = [1, 2] * 10
    rows = [{key: p if choice == 1 else 1 - p for key in ("p", "p_12", "p_21")} for choice in human]
    assert 0.9 < Calibration.fit(rows, human).scale < 8


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (4.0, 3.0), (0.5, -1.0)])
def test_it_finds_the_temperature_and_the_bias_of_a_judge(temperature, bias):
    n = 20_000
    truth = np.random.default_rng(3).normal(0, 1.5, n)
    # Cramer-Rao bound for one observation per pair.
    error = 1 / math.sqrt(np.sum(expit(truth) * (1 - expit(truth)) * truth**2))
    noise = 0.1**2 / 1.5**2  # noise in a regressor shrinks its weight by this fraction
    rows, human = simulate(n, temperature=temperature, bias=bias, seed=3)
    both = Calibration.fit(rows, human)
    assert both.scale * temperature == pytest.approx(1, abs=4 * error + noise)
    rows, human = simulate(n, temperature=temperature, bias=bias, seed=3, orders=("12",))
    one = Calibration.fit(rows, human)
    assert one.scale * temperature == pytest.approx(1, abs=6 * error + noise)
    assert one.bias == pytest.approx(bias / temperature, abs=6 * error * max(1, abs(bias) / temperature) + noise)


def test_it_takes_the_bias_out_of_a_mean_of_probabilities():
    """A bias squeezes mean probabilities towards 1/2; removing it restores the confidence."""
    rows, human = simulate(4000, temperature=1.0, bias=2.0, seed=1, mean_prob=True)
    fresh, choices = simulate(4000, temperature=1.0, bias=2.0, seed=2, mean_prob=True)
    fitted = Calibration.fit(rows, human, mean_prob=True)
    assert 1 < fitted.bias < 3  # scale and bias partly compensate here
    after = [fitted.apply(row) for row in fresh]
    assert calibration_error(after, choices) < 0.03 < calibration_error([row["p"] for row in fresh], choices)


def test_it_makes_labels_right_as_often_as_they_say():
    rows, human = simulate(4000, temperature=5.0, bias=2.0, seed=1)
    fresh, choices = simulate(4000, temperature=5.0, bias=2.0, seed=2)
    fitted = Calibration.fit(rows, human)
    assert calibration_error([row["p"] for row in fresh], choices) > 0.1
    assert calibration_error([fitted.apply(row) for row in fresh], choices) < 0.03


def test_apply_by_hand():
    found, odds = Calibration(scale=0.5, bias=0.25), math.log(0.8 / 0.2)
    # With both orders, the bias cancels, and only p counts.
    assert found.apply({"p_12": 0.7, "p_21": 0.2, "p": 0.8}) == pytest.approx(expit(0.5 * odds), abs=1e-15)
    assert found.apply({"p_12": 0.8, "p_21": None, "p": 0.8}) == pytest.approx(expit(0.5 * odds - 0.25))
    assert found.apply({"p_12": None, "p_21": 0.8, "p": 0.8}) == pytest.approx(expit(0.5 * odds + 0.25))
    assert found.apply({"p": 0.8}) == pytest.approx(expit(0.5 * odds))
    averaged = Calibration(scale=0.5, bias=0.25, mean_prob=True)
    expected = (expit(0.5 * math.log(9) - 0.25) + expit(0.5 * odds + 0.25)) / 2
    assert averaged.apply({"p_12": 0.9, "p_21": 0.8, "p": 0.85}) == pytest.approx(expected)
    # The identity calibration leaves every label as the labeler combined it.
    for row in ({"p_12": 0.9, "p_21": 0.6, "p": 0.75}, {"p_12": 0.9, "p_21": 0.6, "p": 0.77}, {"p": 0.3}):
        assert Calibration().apply(row) == pytest.approx(row["p"], rel=1e-14)
    assert Calibration(mean_prob=True).apply({"p_12": 0.9, "p_21": 0.6, "p": 0.75}) == pytest.approx(0.75, rel=1e-14)


def test_labels_that_are_quite_sure_stay_probabilities():
    for p, expected in ((0.0, 0.0), (1.0, 1.0), (5e-324, 0.0)):
        assert Calibration(scale=40.0, bias=1.0).apply({"p_12": p, "p_21": p, "p": p}) == pytest.approx(expected)
    rows, human = simulate(40, temperature=1.0, bias=0.0)
    rows[0] |= {"p_12": 1.0, "p_21": 0.0, "p": 1.0}
    assert 0 < Calibration.fit(rows, human).scale < 10


@pytest.mark.parametrize(
    "human", [[], [1, 2] * 9, [1] * 40, [2] * 40, [1] * 39 + [2]], ids=["none", "18", "only 1", "only 2", "one 2"]
)
def test_too_little_is_the_users_error(human):
    with pytest.raises(UserError, match="too few to calibrate with.*label.calibration"):
        check_choices(human)


# ---- Whether it helps -----------------------------------------------------------------------------------


def test_what_is_held_out_was_never_fitted_to(monkeypatch):
    """Nor was another pair of the same prompt; the reported numbers match scikit-learn's log loss."""
    rows, human = simulate(33, temperature=2.0, bias=0.5)
    prompts = [i // 3 for i in range(33)]
    for i, row in enumerate(rows):
        row["number"] = i
    fits, tested = [], []
    fit, apply = Calibration.fit.__func__, Calibration.apply

    def spy_fit(cls, rows, human, **options):
        fitted = fit(cls, rows, human, **options)
        fits.append((fitted, {prompts[row["number"]] for row in rows}))
        return fitted

    def spy_apply(self, row):
        seen = next(found for fitted, found in fits if fitted is self)
        assert prompts[row["number"]] not in seen
        tested.append((row["number"], apply(self, row)))
        return tested[-1][1]

    monkeypatch.setattr(Calibration, "fit", classmethod(spy_fit))
    monkeypatch.setattr(Calibration, "apply", spy_apply)
    result = cross_validate(rows, human, prompts, seed=0)
    assert len(fits) == FOLDS * REPEATS and len(tested) == 33 * REPEATS
    divisions = [dict(tested[i : i + 33]) for i in range(0, len(tested), 33)]
    after = [[division[i] for i in range(33)] for division in divisions]
    chosen, before = [h == 1 for h in human], [row["p"] for row in rows]
    assert result["before"]["log_loss"] == pytest.approx(log_loss(chosen, before), abs=1e-12)
    assert result["after"]["log_loss"] == pytest.approx(np.mean([log_loss(chosen, p) for p in after]), abs=1e-12)
    assert result["after"]["ece"] == pytest.approx(np.mean([calibration_error(p, human) for p in after]))
    assert result["before"]["agreement"] == agreement(before, human, prompts)
    assert result["after"]["agreement"] == agreement(after[0], human, prompts)
    assert result["gain"] == pytest.approx(result["before"]["log_loss"] - result["after"]["log_loss"], abs=1e-12)
    gains = np.mean([[log_loss([c], [b], labels=[False, True]) - log_loss([c], [a], labels=[False, True])
                      for c, b, a in zip(chosen, before, p, strict=True)] for p in after], axis=0)  # fmt: skip
    of_prompts = gains.reshape(11, 3).mean(axis=1)
    assert result["standard_error"] == pytest.approx(of_prompts.std(ddof=1) / math.sqrt(11), rel=1e-9)


def test_it_repeats_with_its_seed_and_needs_two_prompts():
    rows, human = simulate(30, temperature=2.0, bias=0.5)
    assert cross_validate(rows, human, seed=1) == cross_validate(rows, human, seed=1)
    assert cross_validate(rows, human, seed=1) != cross_validate(rows, human, seed=2)
    assert cross_validate(rows, human, ["x"] * 30, seed=1) is None


def costs(temperature, mean_prob=False, bias=0.0, judges=25):
    """Log loss on unseen pairs minus that of the judge's own labels, per judge; 0 if the calibration is not used."""
    fresh, choices = simulate(2000, temperature=temperature, bias=bias, seed=1000, mean_prob=mean_prob)
    chosen, unseen = [choice == 1 for choice in choices], columns(fresh)
    own, found = log_loss(chosen, unseen["p"]), []
    for seed in range(judges):
        rows, human = simulate(20, temperature=temperature, bias=bias, seed=seed, mean_prob=mean_prob)
        crossed = cross_validate(rows, human, mean_prob=mean_prob, seed=0)
        if crossed["gain"] > crossed["standard_error"]:
            fitted = Calibration.fit(rows, human, mean_prob=mean_prob)
            found.append(log_loss(chosen, joined(unseen, fitted.scale, fitted.bias, mean_prob)) - own)
        else:
            found.append(0.0)
    return found


def test_what_cross_validation_lets_through_helps(monkeypatch):
    """On average over judges with 20 human-judged pairs; a judge that was calibrated already loses almost nothing."""
    monkeypatch.setattr(calibration, "REPEATS", 1)
    found = {temperature: costs(temperature) for temperature in (0.5, 1.0, 2.0, 4.0)}
    assert np.mean(found[1.0]) < 0.01 and found[1.0].count(0.0) > 20
    assert np.mean(found[4.0]) < -0.1
    assert np.mean(list(found.values())) < 0
    assert np.mean(costs(1.0, mean_prob=True, bias=3.0)) <= 0.005
