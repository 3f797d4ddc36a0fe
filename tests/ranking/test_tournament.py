"""The choice of the next question, against Monte Carlo draws, and the results of whole tournaments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import kendalltau

from trl_rlaif.ranking.bradley_terry import Strengths
from trl_rlaif.ranking.tournament import _Prospect, default_questions, rank_all, rank_by_tournament


class Simulated:
    """A judge with a position effect and noisy log-odds that always answers a question in the same way."""

    def __init__(self, groups, size, noise, position=1.0, seed=0):
        rng = np.random.default_rng(seed)
        self.truth = rng.normal(0, 1, (groups, size))
        noises = rng.normal(0, noise, (groups, size, size))
        self.p = expit(self.truth[:, :, None] - self.truth[:, None, :] + position + noises)
        self.rounds = []

    def __call__(self, asked):
        self.rounds.append(asked)
        return [float(self.p[q.group, q.first, q.second]) for q in asked]

    @property
    def asked(self):
        return [question for asked in self.rounds for question in asked]


def taus(values, truth):
    return np.mean([kendalltau(a, b).statistic for a, b in zip(values, truth, strict=True)])


def test_an_expected_gain_is_that_of_draws_at_random():
    """The number of wrong signs now minus that after an answer, over 400,000 draws of the truth."""
    rng = np.random.default_rng(1)
    root = rng.normal(0, 1, (4, 4))
    covariance = root @ root.T
    values, dispersion = np.array([0.5, 0.1, -0.2, -0.4]), 0.3
    strengths = Strengths(values[None], covariance[None], 0.0, 0.0, dispersion, 1.0)
    one, other = np.triu_indices(4, 1)
    prospect = _Prospect(np.array([0]), one, other, strengths, np.ones((1, 6), bool))
    worlds = rng.multivariate_normal(values, covariance, 400_000)
    true = worlds[:, one] - worlds[:, other]
    before = (np.sign(true) != np.sign(values[one] - values[other])).mean(axis=0)
    np.testing.assert_allclose(prospect.wrong[0], before, atol=3e-3)
    taken: list[int] = []
    for _ in range(2):  # the second answer given the first
        for answer in range(6):
            x = np.zeros((len(taken) + 1, 4))
            for row, pair in enumerate([*taken, answer]):
                x[row, one[pair]], x[row, other[pair]] = 1, -1
            p = expit(x @ values)
            noise = np.diag(dispersion / (p * (1 - p)))
            seen = worlds @ x.T + rng.multivariate_normal(np.zeros(len(x)), noise, len(worlds))
            kalman = covariance @ x.T @ np.linalg.inv(x @ covariance @ x.T + noise)
            means = values + (seen - values @ x.T) @ kalman.T
            after = (np.sign(true) != np.sign(means[:, one] - means[:, other])).mean(axis=0)
            assert prospect.gains()[0, answer] == pytest.approx((before - after).sum(), abs=5e-3)
        taken.append(int(prospect.gains()[0].argmax()))
        prospect.take(np.array(taken[-1:]))


@pytest.mark.parametrize("size", [3, 4, 5, 8])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_budget_is_kept_and_no_question_comes_twice(size, at_once):
    judge = Simulated(7, size, 1.0)
    found = rank_by_tournament(judge, [size] * 7, at_once=at_once)
    questions = default_questions(size)
    assert len(found.asked) == len(set(found.asked)) == 7 * questions
    assert found.asked == judge.asked and all(q.first != q.second for q in found.asked)
    for group in range(7):
        of = [q for q in found.asked if q.group == group]
        assert {i for q in of for i in (q.first, q.second)} == set(range(size))  # every item was compared
        balance = [sum(q.first == i for q in of) - sum(q.second == i for q in of) for i in range(size)]
        assert max(map(abs, balance)) <= 3
    assert max(len(asked) for asked in judge.rounds) == 7 * min(at_once, questions)
    assert default_questions(size) == max(size - 1, size * (size - 1) // 3)


def test_all_questions_are_all_pairs():
    judge, other = Simulated(5, 4, 0.5), Simulated(5, 4, 0.5)
    by_rounds, at_once = rank_by_tournament(judge, [4] * 5, questions=99), rank_all(other, [4] * 5)
    assert set(by_rounds.asked) == set(at_once.asked) and len(other.rounds) == 1
    np.testing.assert_allclose(by_rounds.strengths.values, at_once.strengths.values, atol=1e-6)
    assert at_once.strengths.position == pytest.approx(1.0, abs=0.2)


def test_groups_may_differ_in_size():
    judge = Simulated(4, 5, 0.5)
    found = rank_by_tournament(judge, [5, 2, 1, 3])
    assert {g: sum(q.group == g for q in found.asked) for g in range(4)} == {0: 6, 1: 1, 2: 0, 3: 2}
    assert all(max(q.first, q.second) < [5, 2, 1, 3][q.group] for q in found.asked)
    assert (found.strengths.values[1, 2:] == 0).all() and (found.strengths.values[2] == 0).all()
    assert rank_by_tournament(judge, []).asked == []


def test_the_same_answers_lead_to_the_same_questions():
    first = rank_by_tournament(Simulated(6, 6, 1.0), [6] * 6, at_once=2)
    again = rank_by_tournament(Simulated(6, 6, 1.0), [6] * 6, at_once=2)
    assert first.asked == again.asked
    np.testing.assert_array_equal(first.strengths.values, again.strengths.values)


def test_what_cannot_be_answered_counts_and_says_nothing():
    judge = Simulated(3, 4, 0.5)

    def partly(asked):
        return [
            None if 0 in (q.first, q.second) and q.group == 0 else p for q, p in zip(asked, judge(asked), strict=True)
        ]

    found = rank_by_tournament(partly, [4] * 3, questions=8)
    assert len(found.asked) == 24 and found.answers.count(None) > 0
    assert found.strengths.values[0, 0] == 0 and found.strengths.errors()[0, 0] > found.strengths.errors()[0, 1]


def test_what_is_certain_is_not_asked():
    easy = Simulated(30, 4, 0.01)
    easy.truth[:] = [4.5, 1.5, -1.5, -4.5]
    easy.p = expit(easy.truth[:, :, None] - easy.truth[:, None, :])
    found = rank_by_tournament(easy, [4] * 30, questions=12, confidence=0.95)
    assert 30 * 3 <= len(found.asked) <= 30 * 6
    assert taus(found.strengths.values, easy.truth) == 1


@pytest.mark.parametrize("size", [4, 8])
def test_a_third_of_the_questions_agrees_with_all_pairs_as_another_run_of_them_does(size):
    groups = 200
    judge, again = Simulated(groups, size, 0.5), Simulated(groups, size, 0.5)
    again.p = expit(again.truth[:, :, None] - again.truth[:, None, :] + 1.0
                    + np.random.default_rng(9).normal(0, 0.5, again.p.shape))  # fmt: skip
    everything, another = (rank_all(one, [size] * groups).strengths.values for one in (judge, again))
    third = rank_by_tournament(judge, [size] * groups)
    ceiling = taus(everything, another)
    assert len(third.asked) <= len(rank_all(judge, [size] * groups).asked) / 3
    assert taus(third.strengths.values, everything) > ceiling - 0.03

    rng, chosen = np.random.default_rng(2), []
    for group in range(groups):
        pairs = list(itertools.permutations(range(size), 2))
        chosen += [(group, *pairs[i]) for i in rng.permutation(len(pairs))[: default_questions(size)]]
    from trl_rlaif.ranking.bradley_terry import Comparisons, fit

    group, first, second = np.array(chosen).T
    random = fit(Comparisons(group, first, second, judge.p[group, first, second], np.ones(len(group))), [size] * groups)
    assert taus(third.strengths.values, everything) > taus(random.values, everything) + 0.02
