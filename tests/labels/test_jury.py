"""Combining votes: against a numerical maximum, a plain computation, and members of known reliability."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from trl_rlaif.labels.jury import JOINS, DawidSkene, LogOddsPool, disagreement

NAN = float("nan")


def decisions(rng, count, reliability):
    """The better response of each pair (True: the first), and each member's decisions as votes of 0 and 1."""
    truth = rng.random(count) < 0.5
    right = rng.random((count, len(reliability))) < reliability
    return truth, (right == truth[:, None]).astype(float)


def softened(rng, votes, least=0.6):
    """Votes as probabilities p, calibrated: a decision for the first response has probability p."""
    sure = rng.uniform(least, 0.99, votes.shape)
    kept = rng.random(votes.shape) < sure
    return np.where((votes == 1) == kept, sure, 1 - sure)


def holes(rng, votes, share=0.3):
    return np.where(rng.random(votes.shape) < share, NAN, votes)


def log_posterior(reliability, votes):
    """By definition: the prior, and for each pair the sum over both answers of the product of available votes."""
    total = sum(math.log(a) + math.log(1 - a) for a in reliability)
    for row in votes:
        first = second = 1.0
        for p, a in zip(row, reliability, strict=True):
            if not math.isnan(p):
                first *= a * p + (1 - a) * (1 - p)
                second *= a * (1 - p) + (1 - a) * p
        total += math.log(first / 2 + second / 2)
    return total


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_dawid_skene_is_the_maximum_of_the_posterior(soft, missing):
    rng = np.random.default_rng(5)
    _, votes = decisions(rng, 60, [0.9, 0.75, 0.7, 0.4])
    votes = softened(rng, votes) if soft else votes
    votes = holes(rng, votes) if missing else votes
    found = DawidSkene.fit(votes)
    starts = rng.uniform(0.1, 0.9, (12, 4))
    best = min(
        (minimize(lambda x: -log_posterior(expit(x), votes), logit(start), options={"gtol": 1e-7}) for start in starts),
        key=lambda fit: fit.fun,
    )
    assert log_posterior(found.reliability, votes) == pytest.approx(-best.fun, abs=1e-9)
    expected = expit(best.x)
    # There are two mirrored maxima; this is the one where votes are mostly right.
    np.testing.assert_allclose(found.reliability, expected if expected.mean() > 0.5 else 1 - expected, atol=1e-5)
    for row, p in zip(votes, found.join(votes), strict=True):
        first, second = (
            math.prod(a * v + (1 - a) * (1 - v) for a, v in zip(found.reliability, side, strict=True) if v == v)
            for side in (row, 1 - row)
        )
        assert p == pytest.approx(first / (first + second), abs=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_known_reliabilities_are_recovered(soft):
    rng, known = np.random.default_rng(2), np.array([0.95, 0.8, 0.7, 0.6, 0.3])
    truth, votes = decisions(rng, 20_000, known)
    votes = softened(rng, votes, 0.8) if soft else votes
    found = DawidSkene.fit(votes)
    np.testing.assert_allclose(found.reliability, known, atol=0.02)
    p = found.join(votes)
    assert ((p > 0.5) == truth).mean() > ((votes[:, 0] > 0.5) == truth).mean()
    for low, high in ((0.5, 0.8), (0.8, 0.95), (0.95, 1)):  # confidence matches accuracy
        sure = np.maximum(p, 1 - p)
        inside = (sure > low) & (sure <= high)
        assert ((p > 0.5) == truth)[inside].mean() == pytest.approx(sure[inside].mean(), abs=0.025)


def test_a_pool_is_a_weighted_mean_of_scaled_log_odds():
    rng = np.random.default_rng(3)
    votes = holes(rng, expit(rng.normal(0, 1, (80, 1)) + rng.normal(0, [0.5, 1, 3], (80, 3))))
    found, scales, z = LogOddsPool.fit(votes), [], np.empty_like(votes)
    for j in range(3):
        log_odds = np.array([math.log(p / (1 - p)) if p == p else NAN for p in votes[:, j].clip(0.001, 0.999)])
        scales.append(math.sqrt(np.nanmean(log_odds**2)))
        z[:, j] = log_odds / scales[j]
    weights = []
    for j in range(3):
        mine, rest = [], []
        for row in z:
            others = [row[k] for k in range(3) if k != j and row[k] == row[k]]
            if row[j] == row[j] and others:
                mine.append(row[j])
                rest.append(sum(others) / len(others))
        mine, rest = np.array(mine), np.array(rest)
        weights.append(mine @ rest / math.sqrt((mine @ mine) * (rest @ rest)))
    np.testing.assert_allclose(found.reliability, weights, rtol=1e-12)
    assert min(weights) > 0 and weights[2] < weights[0]
    for row, p in zip(z, found.join(votes), strict=True):
        known = [k for k in range(3) if row[k] == row[k]]
        mean = sum(weights[k] * row[k] for k in known) / sum(weights[k] for k in known) if known else 0
        assert p == pytest.approx(1 / (1 + math.exp(-sorted(scales)[1] * mean)), abs=1e-12)


@pytest.mark.parametrize("join", JOINS.values())
class TestEither:
    def test_what_a_response_is_called_changes_nothing(self, join):
        """Preference data may have the better response first in every pair."""
        rng = np.random.default_rng(4)
        _, votes = decisions(rng, 200, [0.9, 0.7, 0.6])
        votes = holes(rng, softened(rng, votes))
        turned = rng.random(200) < 0.7
        other = np.where(turned[:, None], 1 - votes, votes)
        one, two = join.fit(votes), join.fit(other)
        np.testing.assert_allclose(one.reliability, two.reliability, atol=1e-9)
        p = one.join(votes)
        np.testing.assert_allclose(two.join(other), np.where(turned, 1 - p, p), atol=1e-9)

    def test_who_contradicts_the_others_does_not_win(self, join):
        rng = np.random.default_rng(6)
        truth, votes = decisions(rng, 500, [0.8, 0.8, 0.8, 0.1])
        found = join.fit(votes)
        assert found.reliability[3] < found.chance < min(found.reliability[:3])
        assert ((found.join(votes) > 0.5) == truth).mean() > 0.88  # the other three alone: 0.896

    def test_without_a_vote_nothing_is_known(self, join):
        found = join.fit(np.array([[0.9, 0.8, NAN], [0.3, 0.1, NAN], [NAN, NAN, NAN]]))
        p = found.join(np.array([[NAN, NAN, NAN], [0.9, NAN, NAN], [NAN, NAN, 0.9]]))
        assert p[0] == p[2] == 0.5 < p[1]
        assert found.reliability[2] == found.chance

    def test_votes_may_be_certain_or_say_nothing(self, join):
        votes = np.array([[1.0, 1.0, 0.5], [0.0, 0.0, 0.5], [1.0, 0.0, 0.5]])
        found = join.fit(votes)
        p = found.join(votes)
        assert np.isfinite(p).all() and p[0] > 0.5 > p[1] and p[2] == pytest.approx(0.5, abs=1e-9)
        assert np.isfinite(join.fit(np.full((3, 2), NAN)).reliability).all()


def test_disagreement_is_the_spread_of_the_votes():
    votes = np.array([[0.9, 0.7, 0.8], [1.0, 0.0, NAN], [0.4, NAN, NAN], [NAN, NAN, NAN]])
    found = disagreement(votes)
    assert found[:2] == pytest.approx([math.sqrt(0.02 / 3), 0.5]) and np.isnan(found[2:]).all()
