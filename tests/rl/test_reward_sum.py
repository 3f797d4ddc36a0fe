"""Several rewards as one: weights and normalizations against NumPy in float64, and their saved state."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.ppo import numbers, small_trainer
from helpers.rewards import even_share, length_penalty
from trl_rlaif_advantage import AdvantageModel

from trl_rlaif import RewardTransform, UserError
from trl_rlaif.rl.reward_sum import RewardSum
from trl_rlaif.testing import make_scored_batch

NAMES, WEIGHTS = ("model", "direct", "length"), (1.0, 0.5, -2.0)


def _batches(seed=0, count=4, size=16):
    """Rewards of very different scales, some of them missing."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        rows = generator.normal((0, 9, -200), (1, 4, 300), (size, 3)).astype(np.float32)
        rows[generator.random((size, 3)) < 0.2] = np.nan
        rows[0] = np.nan
        found.append(rows)
    return found


def _parts(rows):
    return {name: torch.tensor(column) for name, column in zip(NAMES, rows.T, strict=True)}


def _expected(batches, normalization):
    """The scores by definition, in float64."""
    seen = []
    for rows in (batch.astype(np.float64) for batch in batches):
        seen.append(rows)
        if normalization == "std":
            rows = rows / np.nanstd(np.concatenate(seen), axis=0, ddof=1)
        elif normalization == "batch":
            rows = (rows - np.nanmean(rows, axis=0)) / np.nanstd(rows, axis=0, ddof=1)
        sums = np.nansum(rows * WEIGHTS, axis=1)
        sums[np.isnan(rows).all(1)] = np.nan  # as in TRL's GRPOTrainer: no reward is not zero
        yield sums


@pytest.mark.parametrize("normalization", ["none", "std", "batch"])
def test_scores_are_the_weighted_sums_of_normalized_rewards(normalization):
    summed = RewardSum(NAMES, WEIGHTS, normalization)
    for rows, wanted in zip(_batches(), _expected(_batches(), normalization), strict=True):
        scores, weighted, _ = summed(_parts(rows))
        assert scores.dtype == torch.float32
        np.testing.assert_allclose(scores.double().numpy(), wanted, rtol=1e-5, atol=1e-4)
        joined = torch.stack(list(weighted.values())).nansum(0)[1:]
        torch.testing.assert_close(joined, scores[1:].nan_to_num(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("normalization", ["std", "batch"])
def test_the_scale_of_a_reward_does_not_matter(normalization):
    scores = []
    for factor in (1.0, 1000.0):
        summed = RewardSum(NAMES, WEIGHTS, normalization)
        scores.append([summed(_parts(rows * [1, factor, 1]))[0] for rows in _batches()][-1])
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_with_nothing_set_the_sum_is_the_sum_to_the_last_bit():
    parts = {name: values.nan_to_num(0) for name, values in _parts(_batches()[0]).items()}
    scores, weighted, _ = RewardSum(NAMES)(parts)
    assert torch.equal(scores, parts["model"] + parts["direct"] + parts["length"])
    assert all(torch.equal(weighted[name], parts[name]) for name in NAMES)


@pytest.mark.parametrize(("normalization", "wanted"), [("none", 0.3), ("std", 0.3), ("batch", 0.0)])
def test_a_reward_that_is_everywhere_the_same(normalization, wanted):
    for values in (torch.full((7,), 0.3), torch.tensor([0.3])):
        scores, _, _ = RewardSum(["model"], None, normalization)({"model": values})
        assert scores.tolist() == pytest.approx([wanted] * len(values))
    rounded = torch.tensor([0.3, 0.3 + 1e-7] * 4)  # float32 noise is not a difference
    scores, _, _ = RewardSum(["model"], None, normalization)({"model": rounded})
    assert scores.tolist() == pytest.approx([wanted] * 8, abs=1e-6)


@pytest.mark.parametrize("normalization", ["none", "std", "batch"])
@pytest.mark.parametrize("weight", [10.0, 0.25, 0.0])
def test_the_advantage_is_that_of_the_reward_model_before_weights(normalization, weight):
    """It is clipped in the unit in which it was trained, weighted like the model's score, and added to the others."""
    rows, expected = np.nan_to_num(_batches()[0]), torch.linspace(-1, 1, 16)
    parts = _parts(rows)
    scores, weighted, scale = RewardSum(NAMES, (weight, 1, 1), normalization)(parts)
    batch = replace(make_scored_batch(16), expected=expected, parts=weighted, model_scores=parts["model"],
                    model_scale=scale)  # fmt: skip
    found = AdvantageModel(margin=0.8).transform(scores, batch)
    reward = rows[:, 0].astype(np.float64)
    unit = 1.0 if normalization == "none" else np.std(reward, ddof=1)
    others = sum(weighted[name].double().numpy() for name in NAMES if name != "model")
    wanted = others + weight / unit * np.clip(reward - expected.double().numpy(), -0.8, 0.8)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-3)  # for sums around 1,000


def test_a_reward_without_weight_makes_no_score():
    summed = RewardSum(["a", "b"], [1.0, 0.0])
    scores, _, _ = summed({"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([5.0, 5.0])})
    assert scores[0] == 1 and scores[1].isnan()


@pytest.mark.parametrize("normalization", ["none", "std", "batch"])
def test_a_reward_without_weight_is_logged_and_no_part_of_what_transforms_see(normalization):
    summed = RewardSum(["a", "b", "c"], [1.0, 0.0, 2.0], normalization)
    logged = torch.tensor([5.0, math.nan, 8.0])
    scores, weighted, _ = summed({"a": torch.tensor([1.0, 2.0, 4.0]), "b": logged, "c": torch.tensor([3.0, 2.0, 2.5])})
    assert list(weighted) == ["a", "c"]
    torch.testing.assert_close(scores, weighted["a"] + weighted["c"])
    metrics = {name: value for name, value in summed.take_metrics().items() if name.split("/")[1] == "b"}
    assert metrics == {
        "score/b": 6.5,
        "rewards/b/std": pytest.approx(1.5 * math.sqrt(2)),
        "rewards/b/none": pytest.approx(1 / 3),
        "rewards/b/weight": 0.0,
    }


def test_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"2 entries for 3 rewards: model, direct, length"):
        RewardSum(NAMES, [1.0, 2.0])
    with pytest.raises(UserError, match="weight 0"):
        RewardSum(["a"], [0.0])
    with pytest.raises(UserError, match="reward_weights"):
        small_trainer(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(UserError, match="reward_normalization is 'z'"):
        small_trainer(tmp_path, reward_normalization="z")
    with pytest.raises(UserError, match="finite"):
        small_trainer(tmp_path, reward_weights=[math.nan])


# ---- In a trainer ---------------------------------------------------------------------------------------


def twins(prompts, completions, completion_ids, **columns):
    return [100.0 * len(ids) for ids in completion_ids]


def also_twins(prompts, completions, completion_ids, **columns):
    return [sum(ids) % 7 for ids in completion_ids]


also_twins.__name__ = "twins"


class Seeing(RewardTransform):
    """Keeps the weighted rewards and their sum."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def transform(self, scores, batch):
        self.seen.append((scores, batch.parts))
        return scores


def test_each_rewards_mean_spread_and_weight_are_logged(tmp_path):
    seeing = Seeing()
    kwargs = {"reward_funcs": [length_penalty, twins, also_twins], "reward_transforms": [seeing]}
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs, reward_weights=[1.0, 0.01, 3.0], temperature=1.5)
    trainer.train()
    names = {"length_penalty": 1.0, "twins": 0.01, "twins 2": 3.0}
    for entry, (scores, parts) in zip(numbers(trainer), seeing.seen, strict=True):
        assert list(parts) == list(names)  # two functions with one name are two rewards
        for name, weight in names.items():
            raw = (parts[name].double() / weight).numpy()
            assert entry[f"score/{name}"] == pytest.approx(raw.mean(), rel=1e-5)
            assert entry[f"rewards/{name}/std"] == pytest.approx(raw.std(ddof=1), rel=1e-4, abs=1e-6)
            assert entry[f"rewards/{name}/weight"] == weight and entry[f"rewards/{name}/none"] == 0
        assert entry["objective/scores"] == pytest.approx(scores.mean().item(), rel=1e-5)
        assert entry["objective/scores"] == pytest.approx(
            sum(weight * entry[f"score/{name}"] for name, weight in names.items()), rel=1e-4
        )


def test_transforms_do_not_see_a_reward_without_weight(tmp_path):
    seeing = Seeing()
    kwargs = {"reward_funcs": [length_penalty, twins, even_share], "reward_transforms": [seeing]}
    trainer = small_trainer(tmp_path, trainer_kwargs=kwargs, reward_weights=[1.0, 0.0, 3.0])
    trainer.train()
    assert all(list(parts) == ["length_penalty", "even_share"] for _, parts in seeing.seen)
    for entry in numbers(trainer):
        assert entry["score/twins"] > 0 and entry["rewards/twins/weight"] == entry["rewards/twins/none"] == 0
        assert "rewards/twins/std" in entry


@pytest.mark.parametrize("normalization", ["std", "batch"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, normalization):
    kwargs = {"trainer_kwargs": {"reward_funcs": [even_share, twins]}, "reward_normalization": normalization}
    whole = small_trainer(tmp_path / "whole", reward_weights=[1.0, 0.5], **kwargs)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 1, "reward_weights": [1.0, 0.5], **kwargs}
    first = small_trainer(tmp_path / "parts", **options)
    first.train()
    again = small_trainer(tmp_path / "parts", **options)
    again.train(resume_from_checkpoint=tmp_path / "parts" / "checkpoint-1")
    assert numbers(again) == numbers(whole)
    assert again.rewards.sum.state_dict() == whole.rewards.sum.state_dict()
    assert len({entry["objective/scores"] for entry in numbers(whole)}) == 3 or normalization == "batch"
