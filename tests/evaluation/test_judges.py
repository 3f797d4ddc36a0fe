"""Agreement between judges against scikit-learn, published examples and large-sample intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from trl_rlaif.evaluation import choices, cohen_kappa, fleiss_kappa, judge_agreement, wilson

# The example in Wikipedia's article on Fleiss' kappa: 10 subjects, 14 raters, 5 categories, kappa = 0.210.
RATED = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def votes_of(counts):
    """Each judge's votes, from counts per category; which judge gave which vote does not matter."""
    rows = [[kind for kind, count in enumerate(row) for _ in range(count)] for row in counts]
    return [list(judge) for judge in zip(*rows, strict=True)]


def two_judges(n, seed, kinds=(1, 2, 0), alike=0.5):
    rng = np.random.default_rng(seed)
    first = rng.choice(kinds, n)
    second = np.where(rng.random(n) < alike, first, rng.choice(kinds, n))
    return first.tolist(), second.tolist()


def plain_fleiss(votes):
    """Fleiss 1971, one pair of judges at a time."""
    judges, n = len(votes), len(votes[0])
    same = sum(votes[a][i] == votes[b][i] for i in range(n) for a in range(judges) for b in range(judges) if a != b)
    observed = same / (n * judges * (judges - 1))
    every = [vote for judge in votes for vote in judge]
    chance = sum((every.count(kind) / len(every)) ** 2 for kind in set(every))
    return (observed - chance) / (1 - chance)


def test_choices():
    assert choices([0.9, 0.51, 0.5, 0.49, 0, None]) == [1, 1, 0, 2, 2, None]


@pytest.mark.parametrize("alike", [0, 0.5, 0.9])
@pytest.mark.parametrize("n", [12, 100])
def test_cohens_kappa_is_sklearns(n, alike):
    first, second = two_judges(n, seed=n, alike=alike)
    found = cohen_kappa(first, second)
    hits = sum(a == b for a, b in zip(first, second, strict=True))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert (found["rate"], found["n"]) == (hits / n, n)
    assert found["interval"] == pytest.approx(wilson(hits, n), abs=1e-12)
    assert found["kappa_interval"][0] <= found["kappa"] <= found["kappa_interval"][1]


def test_cohens_kappa_by_hand():
    # Both yes: 20, both no: 15, different: 5 + 10. The observed agreement is 0.7, that by chance 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert found["kappa"] == pytest.approx(0.4, abs=1e-12)
    # The large-sample standard error is 0.1271 (Fleiss, Cohen and Everitt 1969): a normal interval of 0.151 to 0.649.
    # Wilson's interval is shrunk towards a rate of 1/2, which here is a kappa of 0.
    assert found["kappa_interval"] == pytest.approx((0.151, 0.649), abs=0.035)


def test_the_interval_is_about_that_of_an_ordinary_bootstrap():
    first, second = (np.array(votes) for votes in two_judges(80, seed=2))
    rng = np.random.default_rng(3)
    draws = [rng.integers(80, size=80) for _ in range(400)]
    expected = np.quantile([cohen_kappa_score(first[d], second[d]) for d in draws], [0.025, 0.975])
    found = cohen_kappa(first.tolist(), second.tolist())["kappa_interval"]
    assert found == pytest.approx(tuple(expected), abs=0.04)
    assert expected[1] - expected[0] > 0.2
    votes = [first.tolist(), second.tolist(), first[::-1].tolist()]
    expected = np.quantile([plain_fleiss([[v[i] for i in d] for v in votes]) for d in draws], [0.025, 0.975])
    assert fleiss_kappa(votes)["kappa_interval"] == pytest.approx(tuple(expected), abs=0.03)


def test_judges_that_always_agree_and_those_that_never_do():
    same = cohen_kappa([1, 2, 1, 2] * 5, [1, 2, 1, 2] * 5)
    assert (same["kappa"], same["rate"]) == (1, 1)
    low, high = wilson(20, 20)  # chance agreement is 1/2
    assert same["kappa_interval"] == pytest.approx((2 * low - 1, 2 * high - 1), abs=1e-12) and high == 1
    never = cohen_kappa([1, 2] * 10, [2, 1] * 10)
    assert (never["kappa"], never["rate"]) == (-1, 0)


def test_one_vote_throughout_says_nothing_beyond_chance():
    with np.errstate(all="raise"):
        both = cohen_kappa([1] * 5, [1] * 5), fleiss_kappa([[1] * 5] * 3)
    for found in both:
        assert (found["rate"], found["kappa"], found["kappa_interval"]) == (1, None, None)


def test_fleiss_published_example():
    found = fleiss_kappa(votes_of(RATED))
    assert found["kappa"] == pytest.approx(0.210, abs=0.0005)
    assert (found["rate"], found["n"]) == (0.1, 10)  # all raters agree only on the first subject


@pytest.mark.parametrize("judges", [2, 3, 6])
def test_fleiss_kappa_is_that_of_a_plain_loop(judges):
    rng = np.random.default_rng(judges)
    truth = rng.choice([1, 2, 0], 40)
    votes = [np.where(rng.random(40) < 0.6, truth, rng.choice([1, 2, 0], 40)).tolist() for _ in range(judges)]
    found = fleiss_kappa(votes)
    assert found["kappa"] == pytest.approx(plain_fleiss(votes), abs=1e-12)
    agreeing = sum(len(set(row)) == 1 for row in zip(*votes, strict=True))
    assert found["interval"] == pytest.approx(wilson(agreeing, 40), abs=1e-12)
    assert fleiss_kappa(votes[::-1])["kappa"] == pytest.approx(found["kappa"], abs=1e-12)
    if judges == 2:  # Scott's pi, which is at most Cohen's kappa
        assert found["kappa"] <= cohen_kappa(*votes)["kappa"]
        assert not math.isclose(found["kappa"], cohen_kappa(*votes)["kappa"], abs_tol=1e-6)


def test_missing_votes_are_left_out():
    first, second = [1, None, 2, 0, 1, 2, 2], [1, 2, None, 0, 2, 2, 2]
    kept = [0, 3, 4, 5, 6]
    assert cohen_kappa(first, second) == cohen_kappa([first[i] for i in kept], [second[i] for i in kept])
    assert cohen_kappa([1, None], [None, 2]) is None and fleiss_kappa([[], []]) is None


def test_all_judges_and_each_two():
    votes = {"a": [1, 2, 1, 1, 0, 2], "b": [1, 2, 2, 1, 0, 2], "person": [1, None, 2, 1, None, 1]}
    found = judge_agreement(votes)
    assert found["all"] == fleiss_kappa(list(votes.values())) and found["all"]["n"] == 4
    assert [row["judges"] for row in found["pairs"]] == [("a", "b"), ("a", "person"), ("b", "person")]
    assert found["pairs"][0]["agreement"] == cohen_kappa(votes["a"], votes["b"])
    assert [row["agreement"]["n"] for row in found["pairs"]] == [6, 4, 4]


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError):
        cohen_kappa([1, 2], [1])
    for votes in ({}, {"alone": [1, 2]}):
        with pytest.raises(ValueError, match="at least two judges"):
            judge_agreement(votes)
