"""Strengths, position effect and intervals against scikit-learn, scipy and known truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from trl_rlaif.ranking.bradley_terry import (
    POSITION_PRIOR,
    PRIOR_DISPERSION,
    PRIOR_VARIANCE,
    PRIOR_WEIGHT,
    Comparisons,
    fit,
)


def simulated(groups=6, size=4, count=40, seed=0, hard=False):
    """Soft (or hard) answers to random questions, with a position effect of 0.7 nats."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(0, 1, (groups, size))
    group = rng.integers(groups, size=count)
    first = rng.integers(size, size=count)
    second = (first + rng.integers(1, size, count)) % size
    position = rng.choice([0.0, 1.0], count, p=[0.2, 0.8])
    logits = strengths[group, first] - strengths[group, second] + 0.7 * position + rng.normal(0, 0.5, count)
    p = expit(logits)
    return Comparisons(group, first, second, (rng.random(count) < p).astype(float) if hard else p, position)


def design(c, groups, size):
    """One row per comparison: a column for each item of each group, and one for the position."""
    rows = np.zeros((len(c.p), groups * size + 1))
    rows[range(len(c.p)), c.group * size + c.first] = 1
    rows[range(len(c.p)), c.group * size + c.second] = -1
    rows[:, -1] = c.position
    return rows


def penalties(found, groups, size):
    return np.append(np.full(groups * size, found.dispersion / found.variance), found.dispersion / POSITION_PRIOR**2)


CASES = [{}, {"hard": True}, {"groups": 1, "count": 5}, {"groups": 40, "size": 8, "count": 300, "seed": 3}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strengths_are_scipys_and_scikit_learns(case):
    """For a given dispersion and variance, they are a ridge logistic regression with each answer in both classes."""
    c = simulated(**case)
    groups, size = case.get("groups", 6), case.get("size", 4)
    found = fit(c, [size] * groups)
    x, penalty = design(c, groups, size), penalties(found, groups, size)

    def loss(beta):
        logits = x @ beta
        value = -(c.p * log_expit(logits) + (1 - c.p) * log_expit(-logits)).sum() + (penalty * beta**2).sum() / 2
        return value, x.T @ (expit(logits) - c.p) + penalty * beta

    best = minimize(loss, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-10})
    ours = np.append(found.values.ravel(), found.position)
    np.testing.assert_allclose(ours, best.x, atol=1e-6)
    scaled = x / np.sqrt(penalty)  # scikit-learn has one penalty for all columns
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    both, classes = np.concatenate([scaled, scaled]), np.repeat([1, 0], len(c.p))
    model.fit(both, classes, sample_weight=np.concatenate([c.p, 1 - c.p]))
    np.testing.assert_allclose(ours, model.coef_[0] / np.sqrt(penalty), atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispersion_variance_and_covariance_by_their_equations(case):
    """Schall's equations with full matrices, and the inverse of the full information matrix."""
    c = simulated(**case)
    groups, size = case.get("groups", 6), case.get("size", 4)
    found = fit(c, [size] * groups)
    x, penalty = design(c, groups, size), penalties(found, groups, size)
    mu = expit(x @ np.append(found.values.ravel(), found.position))
    information = x.T @ (x * (mu * (1 - mu))[:, None]) + np.diag(penalty)
    inverse = np.linalg.inv(information)
    covariance = found.dispersion * inverse
    for g in range(groups):
        average = np.eye(size) - 1 / size
        block = average @ covariance[g * size : (g + 1) * size, g * size : (g + 1) * size] @ average
        np.testing.assert_allclose(found.covariance[g], block, rtol=1e-7, atol=1e-12)
    assert found.position_error == pytest.approx(np.sqrt(covariance[-1, -1]), rel=1e-7)
    effective = groups * size - penalty[0] * np.trace(inverse[:-1, :-1])
    free = max(0.0, len(c.p) - effective - (1 - penalty[-1] * inverse[-1, -1]))
    pearson = ((c.p - mu) ** 2 / (mu * (1 - mu))).sum()
    dispersion = (PRIOR_WEIGHT * PRIOR_DISPERSION + pearson) / (PRIOR_WEIGHT + free)
    variance = (PRIOR_WEIGHT * PRIOR_VARIANCE + (found.values**2).sum()) / (PRIOR_WEIGHT + effective)
    wanted = (1, 1) if case.get("hard") else (dispersion, variance)
    assert (found.dispersion, found.variance) == pytest.approx(wanted, rel=1e-6)


def test_both_orders_of_one_pair_give_the_mean_of_their_log_odds():
    """With many certain groups, the prior is negligible: this is `debias: mean_logit`, whatever the position effect."""
    rng = np.random.default_rng(0)
    n = 4000
    logits = rng.normal(0, 1, n)
    group = np.repeat(np.arange(n), 2)
    first, second = np.tile([0, 1], n), np.tile([1, 0], n)
    p = expit(np.stack([logits + 0.6, -logits + 0.6], axis=1).ravel())
    found = fit(Comparisons(group, first, second, p, np.ones(2 * n)), [2] * n)
    differences, _ = found.differences(np.arange(n), np.zeros(n, int), np.ones(n, int))
    assert found.position == pytest.approx(0.6, abs=2e-3)
    np.testing.assert_allclose(differences, logits, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("concentration", [0.0, 2.0, 20.0], ids=["hard", "soft", "sure"])
def test_intervals_hold_the_truth_as_often_as_they_say(concentration, share):
    """Answers are beta-distributed around the model's probability, with a dispersion of 1 / (1 + concentration)."""
    rng = np.random.default_rng(5)
    groups, size = 500, 4
    truth = rng.normal(0, 1, (groups, size))
    group, first, second = (a.ravel() for a in np.meshgrid(range(groups), range(size), range(size), indexing="ij"))
    kept = (first != second) & (rng.random(len(group)) < share)
    group, first, second = group[kept], first[kept], second[kept]
    mu = expit(truth[group, first] - truth[group, second] + 1.0)
    p = rng.beta(concentration * mu, concentration * (1 - mu)) if concentration else (rng.random(len(mu)) < mu) * 1.0
    found = fit(Comparisons(group, first, second, p, np.ones(len(group))), [size] * groups)
    centred = truth - truth.mean(axis=1, keepdims=True)
    inside = np.abs(found.values - centred) < norm.ppf(0.975) * found.errors()
    assert 0.9 < inside.mean() < 0.97
    assert abs(found.position - 1.0) < 0.15
    assert found.dispersion == pytest.approx(1 / (1 + concentration), rel=0.3)
    assert found.variance == pytest.approx(1, rel=0.3)


def test_sure_answers_without_contradiction_stay_finite():
    """Item 0 always wins: the likelihood alone has no maximum."""
    group, first, second = np.zeros(6, int), np.array([0, 0, 0, 1, 2, 1]), np.array([1, 2, 3, 2, 3, 3])
    found = fit(Comparisons(group, first, second, np.ones(6), np.zeros(6)), [4])
    assert np.isfinite(found.values).all() and list(np.argsort(-found.values[0])) == [0, 1, 2, 3]
    assert found.values.sum() == pytest.approx(0, abs=1e-9)


def test_ties_are_half_wins_and_groups_without_answers_have_no_opinion():
    found = fit(Comparisons(*(np.array(v) for v in ([0], [0], [1])), np.array([0.5]), np.array([0.0])), [3, 2])
    np.testing.assert_allclose(found.values, 0, atol=1e-12)
    wanted = found.variance * np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.covariance[1], wanted, rtol=1e-9)
    none = fit(Comparisons(*(np.zeros(0, int),) * 3, np.zeros(0), np.zeros(0)), [3, 2])
    np.testing.assert_array_equal(none.values, 0)


@pytest.mark.parametrize(("difference", "error"), [(0.4, 0.3), (2.0, 1.0), (-1.0, 2.0)])
def test_probabilities_are_means_over_the_strengths(difference, error):
    from trl_rlaif.ranking.bradley_terry import Strengths

    covariance = np.diag([error**2, 0.0])[None]
    one = Strengths(np.array([[difference, 0.0]]), covariance, 0.0, 0.0, 1.0, 1.0)
    exact = quad(lambda z: expit(difference + error * z) * norm.pdf(z), -12, 12)[0]
    index = (np.array([0]), np.array([0]), np.array([1]))
    assert one.probabilities(*index)[0] == pytest.approx(exact, abs=0.02)
    assert one.probabilities(*index) + one.probabilities(*(index[0], index[2], index[1])) == pytest.approx(1, abs=1e-12)
