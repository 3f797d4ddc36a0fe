"""The regulator's drift alarm: its statistic against plain computations, its false alarms, and its power."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binomtest, halfnorm
from trl_rlaif_regulator import DistributionRegulator
from trl_rlaif_regulator.drift import FEWEST, Rise

SHAPES = {
    "normal": lambda generator, size: generator.standard_normal(size),
    "t5": lambda generator, size: generator.standard_t(5, size) / math.sqrt(5 / 3),
    "exponential": lambda generator, size: generator.exponential(size=size),
    "binary": lambda generator, size: (generator.random(size) < 0.1) / 0.3,
}


def _risen(values, offset: float = 0.0) -> Rise:
    rise = Rise()
    for value in values:
        rise.add(offset + value)
    return rise


def test_residuals_are_those_from_all_values_before():
    values = np.random.default_rng(0).standard_normal(200)
    expected = 0.0
    for n in range(FEWEST, len(values)):
        before = values[:n]
        t = (values[n] - before.mean()) / (before.std(ddof=1) * math.sqrt(1 + 1 / n))
        expected += min(t / math.sqrt((n - 1) / (n - 3)), 3.0)  # Student's t with n - 1 degrees of freedom
    for offset in (0.0, 1e6):
        rise = _risen(values, offset)
        assert rise.residuals == pytest.approx(expected, abs=1e-6)
        assert (rise.mean - offset, rise.std) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))


@pytest.mark.parametrize(("total", "count"), [(0.0, 10), (60.0, 100), (-30.0, 40), (400.0, 3000)])
def test_the_evidence_is_the_likelihood_ratio_averaged_over_a_half_normal_prior(total, count):
    rise = Rise(count=FEWEST + count, residuals=total)
    mode = max(total, 0) / (16 + count)
    height = total * mode - count * mode**2 / 2
    found, _ = quad(
        lambda size: math.exp(total * size - count * size**2 / 2 - height) * halfnorm.pdf(size, scale=1 / 4),
        0, 5, points=[mode, mode + 0.1], limit=500,
    )  # fmt: skip
    assert rise.log_evidence == pytest.approx(math.log(found) + height, rel=1e-6)


def _first_alarm(seed, shape, drift=0.0, categories=10, updates=120, size=16):
    """The first update with a significant rise of a category: of any size (stationary) or of half a std (drifting)."""
    generator = np.random.default_rng(seed)
    rises: dict[int, Rise] = {}
    for update in range(updates):
        kinds = generator.integers(0, categories, size)
        scores = SHAPES[shape](generator, size) + np.where(kinds == 0, drift * update / updates, 0.0)
        for kind, score in zip(kinds.tolist(), scores.tolist(), strict=True):
            rises.setdefault(kind, Rise()).add(score)
        watched = [0] if drift else rises
        if any(rises[k].significant(len(rises)) and rises[k].size >= 0.5 * bool(drift) for k in watched if k in rises):
            return update
    return None


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_than_one_in_twenty_stationary_runs_raises_an_alarm(shape):
    """300 runs of 10 categories; neither a KL budget nor a minimum rise suppresses any alarm."""
    alarms = sum(_first_alarm(seed, shape) is not None for seed in range(300))
    assert binomtest(alarms, 300).proportion_ci().high < 0.05


def test_a_drift_is_found():
    """A linear drift of one category; as one of ten, it has about 190 scores."""
    assert sum(_first_alarm(seed, "normal", drift=2.0) is not None for seed in range(50)) >= 48
    assert sum(_first_alarm(seed, "t5", drift=2.0) is not None for seed in range(50)) >= 48
    assert sum(_first_alarm(seed, "normal", drift=1.0, categories=3) is not None for seed in range(30)) >= 28


def _batch(categories, *, group=1, kl=20.0):
    return SimpleNamespace(
        prompts=[[{"role": "user", "content": f"{i // group}"}] for i in range(len(categories))],
        categories=categories,
        kl=torch.full((len(categories),), kl),
    )


def _alarms(regulator, generator, *, updates, rise=0.0, categories=("a", "b"), group=1, shared=0.0, prompts=16):
    """The alarm metrics of categories that ever raise one; scores of the first category rise linearly."""
    found = set()
    for update in range(updates):
        kinds = [categories[i // group % len(categories)] for i in range(prompts * group)]
        noise = generator.standard_normal(prompts * group) * math.sqrt(1 - shared)
        noise += generator.standard_normal(prompts).repeat(group) * math.sqrt(shared)
        scores = noise + [rise * update / updates * (kind == categories[0]) for kind in kinds]
        regulator.transform(torch.tensor(scores, dtype=torch.float32), _batch(kinds, group=group))
        found |= {name for name, value in regulator.metrics().items() if name.endswith("/drift") and value}
    return found


def test_responses_to_one_prompt_count_as_one():
    """As in RLOO and GRPO: treated as independent, half of all stationary runs would raise an alarm."""
    runs = [
        _alarms(
            DistributionRegulator(warm_up=60), np.random.default_rng(seed), updates=60, group=8, shared=0.9, prompts=4
        )
        for seed in range(40)
    ]
    assert sum(map(bool, runs)) <= 1


def test_a_pool_that_is_sorted_by_its_scores_does_not_rise():
    scores, categories = torch.linspace(-2, 2, 400), ["a"] * 400
    regulator = DistributionRegulator()
    for _ in range(5):
        regulator.transform_pool(scores, _batch(categories))
        assert regulator.metrics()["regulator/a/drift"] == 0
    assert regulator.rises["a"].count == 2000 and not regulator.rises["a"].significant(1)


def test_scores_without_a_category_and_late_categories_are_watched(caplog):
    generator, regulator = np.random.default_rng(0), DistributionRegulator()
    with caplog.at_level(logging.WARNING):
        assert _alarms(regulator, generator, updates=60, rise=2.0, categories=(None,)) == {"regulator/unnamed/drift"}
    assert len(caplog.records) == 1 and "Scores of 'unnamed' have risen" in caplog.text  # warned once
    assert _alarms(regulator, generator, updates=60, rise=2.0, categories=("late", "other")) == {"regulator/late/drift"}
