"""Scores by category against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trl_rlaif.evaluation import agreement, by_category, category_figures


def test_figures_by_category():
    rng = np.random.default_rng(0)
    scores, categories = rng.normal(size=90), ["a"] * 40 + ["b"] * 20 + [None] * 30
    scores[:40] += 3
    scores[40:60] *= 4
    found = category_figures(scores.tolist(), categories)
    parts = {"(none)": scores[60:], "a": scores[:40], "b": scores[40:60]}
    assert list(found["categories"]) == list(parts)
    for name, part in parts.items():
        described = stats.describe(part, ddof=0)
        assert found["categories"][name]["n"] == described.nobs
        assert found["categories"][name]["mean"] == pytest.approx(described.mean, rel=1e-12)
        assert found["categories"][name]["std"] == pytest.approx(described.variance**0.5, rel=1e-12)
    means = [part.mean() for part in parts.values()]
    assert found["relative_spread"] == pytest.approx(np.std(means) / np.std(scores), rel=1e-12)
    assert found["std_ratio"] == pytest.approx(parts["b"].std() / min(p.std() for p in parts.values()), rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "categories"), [([], []), ([1.0, 2.0], ["a", "a"]), ([1.0, 1.0], ["a", "b"]), ([1.0, 2.0], ["a", "b"])]
)
def test_what_cannot_be_said_is_none(scores, categories):
    found = category_figures(scores, categories)
    assert found["std_ratio"] is None
    assert (found["relative_spread"] is None) == (len(set(categories)) < 2 or len(set(scores)) < 2)


def test_any_measure_by_category():
    p, human, categories = [0.9, 0.2, 0.7, 0.5], [1, 1, 2, 1], ["b", "a", "b", None]
    found = by_category(agreement, categories, p, human)
    assert list(found) == ["(none)", "a", "b"]
    assert found["b"] == agreement([0.9, 0.7], [1, 2]) and found["a"] == agreement([0.2], [1])
    assert by_category(agreement, [], [], []) == {}
    with pytest.raises(ValueError):
        by_category(agreement, ["a"], [0.9, 0.1], [1, 2])
