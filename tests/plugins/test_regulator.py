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
from trl_rlaif.rl.reward_sum import RewardSum
from trl_rlaif.testing import make_scored_batch


def _batch(categories: list[str | None], *, kl: float = 0.0) -> SimpleNamespace:
    count = len(categories)
    return SimpleNamespace(
        prompts=[f"prompt {i}" for i in range(count)],
        categories=categories,
        kl=torch.full((count,), kl),
        lengths=torch.arange(1, count + 1),
    )


def _task(seed: int, count: int = 60, rise: float = 0.0) -> tuple[torch.Tensor, list[str]]:
    """Scores with a mean and spread that only depend on the category."""
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


# Mean and standard deviation of the scores, by category.
KINDS = {"a": (0.0, 1.0), "b": (9.0, 4.0), "c": (-2.0, 0.3)}


def _of_kinds(generator: np.random.Generator, each: int) -> tuple[np.ndarray, list[str]]:
    categories = [name for name in KINDS for _ in range(each)]
    mean, std = np.array([KINDS[name] for name in categories]).T
    return mean + std * generator.standard_normal(len(categories)), categories


@pytest.mark.parametrize(("count", "offsets", "within"), [(96, 0, 0.02), (96, 1e4, 0.02), (5600, 0, 0.002)])
def test_after_enough_scores_every_category_has_its_own_mean_and_standard_deviation(count, offsets, within):
    """Against numpy: a prior with the spread between categories would turn 1 / 4 / .3 into .33 / .72 / .11."""
    generator, running = np.random.default_rng(0), RunningScores(share=1e-9, prior=16)
    every, categories = _of_kinds(generator, count)
    every += [offsets * "abc".index(name) for name in categories]
    for rows in np.array_split(generator.permutation(len(every)), count // 4):
        running.add((categories[i], every[i]) for i in rows)
    for name, (_, scale) in KINDS.items():
        plain = every[[c == name for c in categories]]
        mean, std = running.figures(name)
        assert mean == pytest.approx(plain.mean(), abs=within * scale)
        assert std == pytest.approx(plain.std(ddof=1), rel=within)


def test_regulated_scores_are_plain_z_scores_of_their_category():
    """Over the last 1,000 scores of each category; the running statistics remember about 2,000."""
    generator, regulator = np.random.default_rng(1), DistributionRegulator(bound=1e6)
    kept: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for _ in range(280):
        scores, categories = _of_kinds(generator, 20)
        found = regulator.transform(torch.tensor(scores, dtype=torch.float32), _batch(categories))
        for category, score, regulated in zip(categories, scores, found.tolist(), strict=True):
            kept[category].append((score, regulated))
    last = {name: np.array(rows[-1000:]) for name, rows in kept.items()}
    unit = regulator._spread(regulator.running, settled=True)
    for score, regulated in (rows.T for rows in last.values()):
        plain = (score - score.mean()) / score.std()
        assert np.abs(regulated / unit - plain).max() < 0.2
        assert (regulated / unit).mean() == pytest.approx(0, abs=0.05)
        assert (regulated / unit).std() == pytest.approx(1, abs=0.05)


def test_the_variances_prior_is_that_of_limma():
    """Smyth 2004: a scaled inverse chi-square prior, for categories of equal size, here solved by scipy."""
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    generator, count = np.random.default_rng(5), 7
    stds = np.sqrt(4 / generator.chisquare(4, 400))
    rows = {f"c{i}": std * generator.standard_normal(count) for i, std in enumerate(stds)}
    running = RunningScores(share=1e-9, prior=1e9)
    running.add((name, score) for name, scores in rows.items() for score in scores)
    squares, free = np.array([scores.var(ddof=1) for scores in rows.values()]), count - 1
    logs = np.log(squares) - digamma(free / 2) + np.log(free / 2)
    excess = logs.var(ddof=1) - polygamma(1, free / 2)
    prior = 2 * brentq(lambda y: polygamma(1, y) - excess, 0.1, 100)
    place = np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2))
    expected = np.sqrt((prior * place + free * squares) / (prior + free))
    found = [running.figures(name)[1] for name in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Its purpose: closer to the true values than the plain standard deviations.
    plain = np.log(np.sqrt(squares) / stds)
    assert (np.log(np.array(found) / stds) ** 2).mean() < 0.7 * (plain**2).mean()


def test_means_are_drawn_together_as_far_as_chance_explains_their_differences():
    """One-way random effects (Paule and Mandel 1982), for any true spread between means."""
    generator, count = np.random.default_rng(2), 4
    for between in (0.0, 0.5, 30.0):
        true = between * generator.standard_normal(200)
        running = RunningScores(share=1e-9, prior=1e9)
        rows = true[:, None] + generator.standard_normal((200, count))
        running.add((f"c{i}", score) for i, scores in enumerate(rows) for score in scores)
        found = np.array([running.figures(f"c{i}")[0] for i in range(200)])
        best = between**2 / (between**2 + 1 / count)  # a category's own weight in the Bayes estimate
        expected = ((best * rows.mean(1) + (1 - best) * rows.mean() - true) ** 2).mean()
        assert ((found - true) ** 2).mean() < 1.25 * expected + 1e-3


def test_a_fresh_category_takes_its_spread_from_the_others_and_explodes_nowhere():
    generator, running = np.random.default_rng(3), RunningScores(share=1e-3, prior=16)
    assert running.figures("any") == (0.0, 1.0)
    for _ in range(50):
        scores, categories = _of_kinds(generator, 4)
        running.add(zip(categories, scores, strict=True))
    before = running.table()
    running.add([("one", 50.0), *(("three", score) for score in (7.0, 7.1, 6.9)), *[("equal", 0.1)] * 3])
    table = running.table()
    assert running.own("equal")[1] == 0  # not the rounding error of its mean square
    for name in KINDS:
        assert table[name] == pytest.approx(before[name], rel=0.02, abs=0.02)
    assert running.figures("never") == running.pooled()
    for name, scores in {"one": [50.0], "three": [7.0, 7.1, 6.9], "equal": [0.1]}.items():
        mean, std = table[name]
        assert 0.01 < std < 4 and all(abs(score - mean) < 2.1 * std for score in scores)


def test_scores_without_a_category_are_a_kind_of_their_own():
    generator, regulator = np.random.default_rng(4), DistributionRegulator(warm_up=0)
    for _ in range(40):
        scores, categories = _of_kinds(generator, 8)
        names = [None if name == "c" else name for name in categories]
        found = regulator.transform(torch.tensor(scores, dtype=torch.float32), _batch(names))
    mean, std = regulator.running.figures(None)
    assert (mean, std) == (pytest.approx(-2, abs=0.1), pytest.approx(0.3, rel=0.2))
    spread = regulator._spread(regulator.running, settled=True)
    expected = 3 * spread * np.tanh((scores[16:] - mean) / std / 3)
    np.testing.assert_allclose(found[16:].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_one_category_alone_keeps_its_own_figures():
    running, scores = RunningScores(share=1e-9, prior=16), [3.0, 5.0, 10.0]
    running.add(("only", score) for score in scores)
    assert running.figures("only") == (pytest.approx(6.0), pytest.approx(np.std(scores, ddof=1)))


def test_no_category_is_worth_more_than_another():
    regulator = DistributionRegulator(warm_up=1, prior=0)
    for seed in range(30):
        scores, categories = _task(seed)
        found = regulator.transform(scores, _batch(categories))
        assert found.abs().max() <= 3 * regulator.running.within()[0] / regulator.unit
    by = {name: found[[c == name for c in categories]] for name in set(categories)}
    raw = {name: scores[[c == name for c in categories]] for name in set(categories)}
    assert max(abs(x.mean()) for x in by.values()) < 0.6 < 3 < max(x.mean() for x in raw.values())
    assert max(x.std() for x in by.values()) / min(x.std() for x in by.values()) < 1.6
    for name, x in by.items():  # the order within a category is preserved
        assert torch.equal(x.argsort(), raw[name].argsort())
    mean, std = regulator.running.figures("code")
    z = (scores[0].item() - mean) / std
    spread = regulator.running.within()[0] / regulator.unit
    assert spread == pytest.approx(1, abs=0.3)  # the unit is from the first batch: 20 scores per category
    assert found[0].item() == pytest.approx(spread * 3 * math.tanh(z / 3), abs=1e-5)


def test_the_spread_within_categories_is_that_of_the_residuals():
    running = RunningScores(share=1e-9, prior=0)
    scores, categories = _task(3, 600)
    running.add(zip(categories, scores.tolist(), strict=True))
    running.add([(None, 5.0), (None, 9.0)])  # prompts without a category form their own
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
        regulator.transform(scores, _batch(names))
        spread = regulator._spread(regulator.running, settled=step > 0)
        assert spread <= 1.35 and (spread > 0.7 or step * batch < 16)


@pytest.mark.parametrize("size", [0.2, 5.0])
def test_smaller_differences_are_never_paid_more(size):
    """A learning policy's scores become ever more alike; regulated scores start with a spread of at most 1."""
    regulator, spreads = DistributionRegulator(share=0.05, warm_up=1), []
    for step, narrowing in enumerate([1.0] * 10 + [0.1] * 10):
        scores = size * narrowing * torch.randn(90, generator=torch.Generator().manual_seed(step))
        found = regulator.transform(scores, _batch(["code", "chat", "maths"] * 30))
        spreads.append(found.std().item())
    assert spreads[9] == pytest.approx(min(size, 1.0), rel=0.25)
    assert spreads[-1] == pytest.approx(0.1 * min(size, 1.0), rel=0.25)


def test_while_it_warms_up_all_are_scaled_alike():
    regulator = DistributionRegulator(warm_up=2)
    scores, categories = _task(0)
    found = regulator.transform(scores, _batch(categories))
    assert torch.equal(found.argsort(), scores.argsort())  # one increasing function for all


def test_scores_that_are_all_alike_are_zero_and_not_noise():
    regulator = DistributionRegulator(warm_up=0, prior=0)
    found = regulator.transform(torch.full((6,), 0.1), _batch(["a", "b"] * 3))
    assert found.abs().max() < 1e-3


def test_its_state_goes_on_where_it_was():
    whole, first, second = (DistributionRegulator() for _ in range(3))
    for seed in range(6):
        scores, categories = _task(seed)
        expected = whole.transform(scores, _batch(categories))
        if seed == 3:
            second.load_state_dict(first.state_dict())
        found = (first if seed < 3 else second).transform(scores, _batch(categories))
        assert torch.equal(found, expected)
    assert second.metrics() == whole.metrics()
    old = {name: value for name, value in whole.state_dict().items() if name != "unit"}
    second.load_state_dict(old)  # from before the state had a unit


@pytest.mark.parametrize(("rise", "kl", "alarm"), [(4.0, 20.0, True), (4.0, 5.0, False), (0.0, 20.0, False)])
def test_a_category_that_rises_beyond_its_kl_budget_raises_an_alarm(rise, kl, alarm, caplog):
    regulator = DistributionRegulator(share=0.05)
    for seed in range(12):
        scores, categories = _task(seed, rise=rise if seed > 2 else 0.0)
        with caplog.at_level(logging.WARNING):
            regulator.transform(scores, _batch(categories, kl=kl))
    numbers = regulator.metrics()
    assert [numbers[f"regulator/{name}/drift"] for name in ("code", "chat", "maths")] == [float(alarm), 0, 0]
    assert any("Scores of 'code' have risen" in record.message for record in caplog.records) == alarm
    assert numbers["regulator/code/mean"] == pytest.approx(4 + rise, abs=0.7)


def test_small_transforms():
    scores, batch = torch.tensor([-7.0, 0.5, 9.0, 2.0]), _batch([None] * 4)
    assert Clip(low=-1, high=2).transform(scores, batch).tolist() == [-1, 0.5, 2, 2]
    white = Whiten().transform(scores, batch)
    assert white.mean().abs() < 1e-6 and white.std(correction=0).item() == pytest.approx(1)
    assert Whiten().transform(torch.full((48,), 0.1), _batch([None] * 48)).abs().max() < 1e-6
    assert LengthPenalty(per_token=0.5, free=2).transform(scores, batch).tolist() == [-7, 0.5, 8.5, 1.0]
    assert LengthPenalty(per_token=-0.5, free=2).transform(scores, batch).tolist() == [-7, 0.5, 9.5, 3.0]
    with pytest.raises(ValidationError):
        Clip(low=1, high=1)


def test_an_ensemble_joins_the_rewards_themselves():
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, -2.0])}
    batch = SimpleNamespace(parts=parts)

    def joined(**options):
        return Ensemble(**options).transform(torch.tensor([4.0, 0.0]), batch).tolist()

    assert joined(join="mean") == [2, 0] and joined(join="min") == [1, -2]
    assert joined(k=0.5) == [1.5, -1]
    with pytest.raises(UserError, match="two rewards or more"):
        Ensemble().transform(torch.zeros(2), SimpleNamespace(parts={"a": parts["a"]}))


def test_the_ensemble_joins_the_rewards_that_a_response_has():
    nan = math.nan
    batch = SimpleNamespace(
        parts={
            "a": torch.tensor([4.0, nan, 1.0]),
            "b": torch.tensor([0.0, 2.0, nan]),
            "c": torch.tensor([2.0, 4.0, nan]),
        }
    )

    def joined(**options):
        return Ensemble(**options).transform(torch.zeros(3), batch).tolist()

    assert joined(join="mean") == [2, 3, 1] and joined(join="min") == [0, 2, 1]
    assert joined(k=1.0) == pytest.approx([2 - math.sqrt(8 / 3), 2, 1])


@pytest.mark.parametrize("options", [{"join": "mean"}, {"join": "min"}, {"join": "pessimistic", "k": 0.5}])
def test_a_reward_without_weight_has_no_say_in_the_ensemble(options):
    given = {"a": torch.tensor([1.0, 2.0]), "logged": torch.tensor([-100.0, 100.0]), "b": torch.tensor([3.0, 6.0])}

    def joined(names, weights):
        scores, parts, _ = RewardSum(names, weights)({name: given[name] for name in names})
        return Ensemble(**options).transform(scores, SimpleNamespace(parts=parts)).tolist()

    wanted = joined(["a", "b"], [1.0, 1.0])
    assert min(wanted) > 0 and joined(["a", "logged", "b"], [1.0, 0.0, 1.0]) == wanted
    with pytest.raises(UserError, match="two rewards or more"):
        joined(["a", "logged"], [1.0, 0.0])


@pytest.mark.parametrize(
    "transform",
    [DistributionRegulator(), Clip(), Whiten(), Ensemble(), LengthPenalty()],
    ids=lambda t: type(t).__name__,
)
def test_a_process_whose_responses_all_lack_a_reward_takes_part_with_none(transform):
    batch = make_scored_batch(4).select(torch.tensor([], dtype=torch.int64))
    assert transform.transform(torch.tensor([]), batch).shape == (0,)
