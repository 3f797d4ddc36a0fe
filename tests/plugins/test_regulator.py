"""The distribution regulator and the small transforms, against plain computations."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from trl_rlaif_regulator import Clip, DistributionRegulator, Ensemble, LengthPenalty, Whiten
from trl_rlaif_regulator.running import Moments, RunningScores

from trl_rlaif import UserError
from trl_rlaif.testing import make_rollout


def _rollout(categories: list[str | None], *, kl: float = 0.0) -> SimpleNamespace:
    count = len(categories)
    mask = torch.ones(count, 4, dtype=torch.bool)
    return SimpleNamespace(
        categories=categories,
        logprobs=torch.full((count, 4), kl / 4),
        ref_logprobs=torch.zeros(count, 4),
        masks=lambda: (mask, mask),
        lengths=torch.arange(1, count + 1),
    )


def _task(seed: int, count: int = 60, rise: float = 0.0) -> tuple[torch.Tensor, list[str]]:
    """Scores whose mean and spread depend on the kind of prompt alone."""
    generator = torch.Generator().manual_seed(seed)
    categories = ["code", "chat", "maths"] * (count // 3)
    mean = torch.tensor([4.0 + rise, -1.0, 0.5] * (count // 3))
    std = torch.tensor([2.0, 0.3, 1.0] * (count // 3))
    return mean + std * torch.randn(count, generator=generator), categories


def test_running_figures_are_weighted_means_without_bias():
    moments, share = Moments(), 0.1
    batches = [[1.0, 3.0], [2.0], [-4.0, 0.5, 7.0]]
    weights, values = [], []
    for batch in batches:
        moments.add(batch, share)
        keep = (1 - share) ** len(batch)
        weights = [w * keep for w in weights] + [(1 - keep) / len(batch)] * len(batch)
        values += batch
    assert moments.mean == pytest.approx(np.average(values, weights=weights), rel=1e-12)
    assert moments.second == pytest.approx(np.average(np.square(values), weights=weights), rel=1e-12)
    assert moments.count == 6


def test_few_scores_count_little_and_unseen_categories_have_the_pooled_figures():
    running = RunningScores(share=0.001, prior=10)
    assert running.figures("any") == (0.0, 1.0)
    running.add([("often", x) for x in (1.0, 3.0) * 500] + [("seldom", 50.0)])
    pooled = running.figures(None)
    assert running.figures("never") == pooled == running.figures("")
    mean, std = running.figures("often")
    assert mean == pytest.approx(2, abs=0.01) and std == pytest.approx(1, abs=0.05)
    assert running.figures("seldom")[0] == pytest.approx((50 + 10 * pooled[0]) / 11, rel=1e-9)


def test_no_category_is_worth_more_than_another():
    regulator = DistributionRegulator(warm_up=1, prior=0)
    for seed in range(30):
        scores, categories = _task(seed)
        found = regulator.transform(scores, _rollout(categories))
        assert found.abs().max() <= 3 * regulator.running.within()[0] / regulator.unit
    by = {name: found[[c == name for c in categories]] for name in set(categories)}
    raw = {name: scores[[c == name for c in categories]] for name in set(categories)}
    assert max(abs(x.mean()) for x in by.values()) < 0.6 < 3 < max(x.mean() for x in raw.values())
    assert max(x.std() for x in by.values()) / min(x.std() for x in by.values()) < 1.6
    for name, x in by.items():  # the order within a category stays
        assert torch.equal(x.argsort(), raw[name].argsort())
    mean, std = regulator.running.figures("code")
    z = (scores[0].item() - mean) / std
    spread = regulator.running.within()[0] / regulator.unit
    assert spread == pytest.approx(1, abs=0.3)  # against 20 scores of each in the first batch
    assert found[0].item() == pytest.approx(spread * 3 * math.tanh(z / 3), abs=1e-5)


def test_the_spread_within_categories_is_that_of_the_residuals():
    running = RunningScores(share=1e-9, prior=0)
    scores, categories = _task(3, 600)
    running.add(zip(categories, scores.tolist(), strict=True))
    running.add([(None, 5.0), (None, 9.0)])  # prompts without a category are a kind of their own
    parts = [scores.numpy()[[c == name for c in categories]] for name in ("code", "chat", "maths")] + [np.array([5, 9])]
    expected = sum(((x - x.mean()) ** 2).sum() for x in parts) / sum(len(x) - 1 for x in parts)
    assert running.within() == (pytest.approx(math.sqrt(expected), rel=1e-5), True)
    assert RunningScores(0.1, 1).within() == (0, False)


@pytest.mark.parametrize(("kinds", "batch"), [(8, 8), (30, 16), (20, 8), (100, 32), (4, 1), (None, 8)])
def test_many_categories_in_small_batches_neither_silence_nor_inflate_the_reward(kinds, batch):
    regulator, generator = DistributionRegulator(), torch.Generator().manual_seed(0)
    for step in range(150):
        scores = 4 * torch.randn(batch, generator=generator)
        names = [f"c{(step * batch + i) % kinds}" if kinds else None for i in range(batch)]
        regulator.transform(scores, _rollout(names))
        spread = regulator._spread()
        assert spread <= 1.35 and (spread > 0.7 or step * batch < 16)


@pytest.mark.parametrize("size", [0.2, 5.0])
def test_smaller_differences_are_never_paid_more(size):
    """A policy that learns has scores that lie ever closer together; scores begin with a spread of 1 at most."""
    regulator, spreads = DistributionRegulator(share=0.05, warm_up=1), []
    for step, narrowing in enumerate([1.0] * 10 + [0.1] * 10):
        scores = size * narrowing * torch.randn(90, generator=torch.Generator().manual_seed(step))
        found = regulator.transform(scores, _rollout(["code", "chat", "maths"] * 30))
        spreads.append(found.std().item())
    assert spreads[9] == pytest.approx(min(size, 1.0), rel=0.25)
    assert spreads[-1] == pytest.approx(0.1 * min(size, 1.0), rel=0.25)


def test_while_it_warms_up_all_are_scaled_alike():
    regulator = DistributionRegulator(warm_up=2)
    scores, categories = _task(0)
    found = regulator.transform(scores, _rollout(categories))
    assert torch.equal(found.argsort(), scores.argsort())  # one increasing map for all


def test_scores_that_are_all_alike_are_zero_and_not_noise():
    regulator = DistributionRegulator(warm_up=0, prior=0)
    found = regulator.transform(torch.full((6,), 0.1), _rollout(["a", "b"] * 3))
    assert found.abs().max() < 1e-3


def test_its_state_goes_on_where_it_was():
    whole, first, second = (DistributionRegulator() for _ in range(3))
    for seed in range(6):
        scores, categories = _task(seed)
        expected = whole.transform(scores, _rollout(categories))
        if seed == 3:
            second.load_state_dict(first.state_dict())
        found = (first if seed < 3 else second).transform(scores, _rollout(categories))
        assert torch.equal(found, expected)
    assert second.metrics() == whole.metrics()
    old = {name: value for name, value in whole.state_dict().items() if name != "unit"}
    second.load_state_dict(old)  # from before it had one


@pytest.mark.parametrize(("rise", "kl", "alarm"), [(4.0, 20.0, True), (4.0, 5.0, False), (0.0, 20.0, False)])
def test_a_category_that_rises_beyond_its_kl_budget_raises_an_alarm(rise, kl, alarm, caplog):
    regulator = DistributionRegulator(share=0.05)
    for seed in range(12):
        scores, categories = _task(seed, rise=rise if seed > 2 else 0.0)
        with caplog.at_level(logging.WARNING):
            regulator.transform(scores, _rollout(categories, kl=kl))
    numbers = regulator.metrics()
    assert [numbers[f"regulator/{name}/drift"] for name in ("code", "chat", "maths")] == [float(alarm), 0, 0]
    assert any("Scores of 'code' have risen" in record.message for record in caplog.records) == alarm
    assert numbers["regulator/code/mean"] == pytest.approx(4 + rise, abs=0.7)


def test_small_transforms():
    scores, rollout = torch.tensor([-7.0, 0.5, 9.0, 2.0]), _rollout([None] * 4)
    assert Clip(low=-1, high=2).transform(scores, rollout).tolist() == [-1, 0.5, 2, 2]
    white = Whiten().transform(scores, rollout)
    assert white.mean().abs() < 1e-6 and white.std(correction=0).item() == pytest.approx(1)
    assert LengthPenalty(per_token=0.5, free=2).transform(scores, rollout).tolist() == [-7, 0.5, 8.5, 1.0]
    with pytest.raises(ValidationError):
        Clip(low=1, high=1)


def test_an_ensemble_joins_the_rewards_themselves():
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, -2.0])}
    rollout = SimpleNamespace(reward_parts=parts)

    def joined(**options):
        return Ensemble(**options).transform(torch.tensor([4.0, 0.0]), rollout).tolist()

    assert joined(join="mean") == [2, 0] and joined(join="min") == [1, -2]
    assert joined(k=0.5) == [1.5, -1]
    with pytest.raises(UserError, match="two rewards or more"):
        Ensemble().transform(torch.zeros(2), SimpleNamespace(reward_parts={"a": parts["a"]}))


def test_the_ensemble_joins_the_rewards_that_a_response_has():
    nan = math.nan
    rollout = SimpleNamespace(
        reward_parts={
            "a": torch.tensor([4.0, nan, 1.0]),
            "b": torch.tensor([0.0, 2.0, nan]),
            "c": torch.tensor([2.0, 4.0, nan]),
        }
    )

    def joined(**options):
        return Ensemble(**options).transform(torch.zeros(3), rollout).tolist()

    assert joined(join="mean") == [2, 3, 1] and joined(join="min") == [0, 2, 1]
    assert joined(k=1.0) == pytest.approx([2 - math.sqrt(8 / 3), 2, 1])


@pytest.mark.parametrize(
    "transform",
    [DistributionRegulator(), Clip(), Whiten(), Ensemble(), LengthPenalty()],
    ids=lambda t: type(t).__name__,
)
def test_a_process_whose_responses_all_lack_a_reward_takes_part_with_none(transform):
    rollout = make_rollout(4).select(torch.tensor([], dtype=torch.int64))
    assert transform.transform(torch.tensor([]), rollout).shape == (0,)
