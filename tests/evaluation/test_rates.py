"""Pairwise accuracy of a reward model and the harmless rate, by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score

from trl_rlaif.evaluation import harmless_rate, pairwise_accuracy, share_interval


def test_pairwise_accuracy_by_hand():
    found = pairwise_accuracy([1.0, 2.0, 0.5, -1.0, 3.0], [0.0, 2.0, 0.7, -2.0, float("-inf")])
    assert found == {"rate": 3.5 / 5, "interval": share_interval([1, 0.5, 0, 1, 1]), "n": 5, "ties": 1}


def test_pairwise_accuracy_is_sklearns_accuracy_with_scipys_interval():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.5, 1, 150), rng.normal(0, 1, 150)
    found = pairwise_accuracy(chosen.tolist(), rejected.tolist())
    assert found["rate"] == pytest.approx(accuracy_score([1] * 150, chosen > rejected), abs=1e-12)
    expected = binomtest(int((chosen > rejected).sum()), 150).proportion_ci(0.95, method="wilson")
    assert found["interval"] == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.55 < found["rate"] < 0.75


def test_pairwise_accuracy_by_category():
    chosen, rejected, categories = [1, 1, 0, 0, 5], [0, 2, 0, 1, 4], ["code", "chat", None, "chat", "code"]
    found = pairwise_accuracy(chosen, rejected, categories)
    assert found["rate"] == 0.5
    assert found["by_category"] == {
        "(none)": {"rate": 0.5, "interval": share_interval([0.5]), "n": 1, "ties": 1},
        "chat": {"rate": 0.0, "interval": share_interval([0, 0]), "n": 2, "ties": 0},
        "code": {"rate": 1.0, "interval": share_interval([1, 1]), "n": 2, "ties": 0},
    }


def test_a_reward_model_that_knows_nothing_but_ties_is_at_a_half():
    assert pairwise_accuracy([0.0] * 8, [0.0] * 8)["rate"] == 0.5


def test_pairwise_accuracy_of_wrong_input():
    assert pairwise_accuracy([], []) is None and pairwise_accuracy([], [], []) is None
    with pytest.raises(ValueError, match="NaN"):
        pairwise_accuracy([1.0, float("nan")], [0.0, 0.0])
    with pytest.raises(ValueError):
        pairwise_accuracy([1.0], [0.0, 0.0])
    with pytest.raises(ValueError):
        pairwise_accuracy([1.0], [0.0], ["a", "b"])


def test_harmless_rate_by_hand():
    found = harmless_rate([True, False, None, True, 0.5, 0.9, 0.1])
    assert found == {"rate": 3.5 / 6, "interval": share_interval([1, 0, 1, 0.5, 1, 0]), "n": 6, "unjudged": 1}
    expected = binomtest(88, 100).proportion_ci(0.95, method="wilson")
    found = harmless_rate([True] * 88 + [False] * 12)["interval"]
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert harmless_rate([]) is None and harmless_rate([None, None]) is None
