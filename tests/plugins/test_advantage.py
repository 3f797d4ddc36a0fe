"""The Advantage Model against plain float64 loops, and its role in training and in PPO."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from trl_rlaif_advantage import AdvantageModel
from trl_rlaif_advantage.losses import advantage, advantage_loss, ratio_share

from trl_rlaif import PreferenceScores, UserError

N, MAX_SHARE = 3.0, 0.6


def _numbers(count: int, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "chosen": 2 * draw(count),
        "rejected": 2 * draw(count),
        "expected": draw(count),
        "chosen_log_ratios": 2 * draw(count, k),
        "rejected_log_ratios": 2 * draw(count, k),
    }


def _advantage_by_hand(r: float, e: float, log_ratios: list[float]) -> float:
    if not log_ratios:
        return r - e
    ratios = [math.exp(x) for x in log_ratios]
    scale = min(1.0, N * MAX_SHARE / sum(ratios))
    return r - (N - 1) / N * e - sum(scale * ratio / N * r for ratio in ratios)


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def _loss_by_hand(numbers: dict[str, torch.Tensor], p: list[float], margins: list[float]) -> float:
    total = 0.0
    for i, (q, m) in enumerate(zip(p, margins, strict=True)):
        e = numbers["expected"][i].item()
        c, r = (
            _advantage_by_hand(numbers[name][i].item(), e, numbers[f"{name}_log_ratios"][i].tolist())
            for name in ("chosen", "rejected")
        )
        total += q * (_log_sigmoid(c - r) + _log_sigmoid(m - c) + _log_sigmoid(m + r))
        total += (1 - q) * (_log_sigmoid(r - c) + _log_sigmoid(m - r) + _log_sigmoid(m + c))
    return -total / len(p)


def _scores(numbers: dict[str, torch.Tensor], p, categories=None) -> PreferenceScores:
    count = len(numbers["chosen"])
    return PreferenceScores(p=torch.tensor(p), categories=categories or [None] * count, **numbers)


@pytest.mark.parametrize("p", [[1.0, 1.0, 0.0, 1.0, 0.0], [0.9, 0.5, 0.31, 1.0, 0.02]], ids=["hard", "soft"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_loss_is_the_formula(k, p):
    numbers = _numbers(5, k)
    categories = ["code", "chat", None, "code", "chat"]
    model = AdvantageModel(margin=2.0, margins={"code": 0.7}, weight=N, max_share=MAX_SHARE)
    expected = _loss_by_hand(numbers, p, [0.7, 2.0, 2.0, 0.7, 2.0])
    assert model.loss(_scores(numbers, p, categories)).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_e_learns_from_the_bounding_terms_alone(k):
    numbers = _numbers(4, k, seed=1)
    for x in numbers.values():
        x.requires_grad_()
    shares = (ratio_share(numbers[f"{name}_log_ratios"], N, MAX_SHARE) if k else 0.0 for name in ("chosen", "rejected"))
    weight = N if k else None
    c, r = (
        advantage(numbers[name], numbers["expected"], share, weight)
        for name, share in zip(("chosen", "rejected"), shares, strict=True)
    )
    ranking = torch.nn.functional.logsigmoid(c - r).sum()
    assert torch.equal(torch.autograd.grad(ranking, numbers["expected"], retain_graph=True)[0], torch.zeros(4).double())
    p = torch.tensor([1.0, 0.8, 0.0, 0.5])
    (found,) = torch.autograd.grad(advantage_loss(c, r, p, 1.5), numbers["expected"])
    slope = -(N - 1) / N if k else -1.0  # da / de
    c, r, p = c.double(), r.double(), p.double()
    up = [torch.sigmoid(x - 1.5) for x in (c, r)]  # -d log s(m - a) / da
    down = [-torch.sigmoid(-x - 1.5) for x in (c, r)]  # -d log s(m + a) / da
    by_hand = slope * (p * (up[0] + down[1]) + (1 - p) * (up[1] + down[0])) / 4
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("k", [0, 3])
def test_far_out_scores_in_bfloat16_give_finite_losses_and_gradients(k, size):
    numbers = {name: (x * 0 + size).bfloat16().requires_grad_() for name, x in _numbers(3, k).items()}
    numbers["rejected"] = (-numbers["chosen"].detach()).requires_grad_()
    loss = AdvantageModel(weight=N).loss(_scores(numbers, [1.0, 0.4, 0.0]))
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for name, x in numbers.items() if x.numel() and "ratios" not in name)


def test_without_other_policies_it_is_r_less_e():
    r, e = torch.tensor([1.5, -2.0]), torch.tensor([0.5, 1.0])
    assert advantage(r, e).tolist() == [1.0, -3.0]
    scores = [r, r - 1, torch.ones(2), [None] * 2, e]
    none = torch.zeros(2, 0)
    assert torch.equal(
        AdvantageModel().loss(PreferenceScores(*scores)), AdvantageModel().loss(PreferenceScores(*scores, none, none))
    )


@pytest.mark.parametrize("max_share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("size", [0.0, 3.0, 1e4])
def test_some_of_r_is_left_whatever_the_ratios(size, max_share):
    log_ratios = size * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_ratios[0] = -math.inf
    found = ratio_share(log_ratios, N, max_share)
    assert (found >= 0).all() and (found <= max_share * (1 + 1e-6)).all() and found[0] == 0
    with np.errstate(over="ignore"):
        plain = np.minimum(np.exp(log_ratios.numpy()).sum(-1) / N, max_share)
    np.testing.assert_allclose(found.numpy(), plain, rtol=1e-3 if size == 1e4 else 1e-5)  # exp of a rounded sum


# ---- Training with other policies, and the reward in RL ---------------------------------------------------


def _trained_on(log_ratio: float, k: int, **options):
    """The model, and freely trained scores of eight pairs with their e, after some steps; chosen is always better."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, e = (0.1 * torch.randn(8, generator=generator) for _ in range(3))
    learned = [x.requires_grad_() for x in (chosen, rejected, e)]
    ratios, model = torch.full((8, k), log_ratio), AdvantageModel(**options)
    optimizer = torch.optim.Adam(learned, lr=0.05)
    for _ in range(200):
        scores = PreferenceScores(chosen, rejected, torch.ones(8), [None] * 8, e, ratios, ratios)
        optimizer.zero_grad()
        model.loss(scores).backward()
        optimizer.step()
    return model, *(x.detach() for x in learned)


@pytest.mark.parametrize("log_ratio", [-2.0, 0.0, 3.0, 50.0])
def test_training_with_other_policies_ranks_the_right_way_round(log_ratio):
    _, chosen, rejected, _ = _trained_on(log_ratio, 1)
    assert (chosen > rejected + 0.5).all()


@pytest.mark.parametrize("options", [{}, {"weight": N, "max_share": MAX_SHARE}])
@pytest.mark.parametrize("log_ratio", [-2.0, 0.0, 3.0])
def test_rl_is_paid_what_was_trained(log_ratio, options):
    model, r, _, e = _trained_on(log_ratio, 2, **options)
    n, bound = options.get("weight", 2.0), options.get("max_share", 0.5)
    share = min(2 * math.exp(log_ratio) / n, bound)
    wanted = (1 - share) * r.double() - (n - 1) / n * e.double()
    assert wanted.abs().max() < 4  # within the margin
    heir = AdvantageModel()  # rl may set other options: N is that of training
    heir.load_state_dict(torch.load(_stored(model.state_dict()), weights_only=True))
    batch = SimpleNamespace(model_scores=None, expected=e, categories=[None] * 8)
    for paying in (model, heir):
        torch.testing.assert_close(paying.transform(r, batch).double(), wanted, rtol=1e-5, atol=1e-6)


def test_rl_is_paid_with_the_mean_of_the_shares():
    log_ratios = torch.tensor([[-1.0], [-3.0], [2.0], [-0.5]])
    model, ones = AdvantageModel(), torch.ones(2)
    for chosen, rejected in (log_ratios[:2], log_ratios[2:]), (log_ratios[2:], log_ratios[:2]):
        model.loss(PreferenceScores(ones, -ones, ones, [None] * 2, ones, chosen, rejected))
    with torch.no_grad():  # held-out pairs change nothing
        model.loss(PreferenceScores(ones, -ones, ones, [None] * 2, ones, log_ratios[2:], log_ratios[2:]))
    share = np.minimum(np.exp(log_ratios.double().numpy()) / 2, 0.5).mean()
    paid = model.transform(
        torch.tensor([1.0, -2.0]), SimpleNamespace(model_scores=None, expected=ones, categories=[None] * 2)
    )
    np.testing.assert_allclose(paid.numpy(), [1 - share - 0.5, -2 * (1 - share) - 0.5], rtol=1e-6)


def test_a_state_that_knows_of_no_other_policies_pays_r_less_e():
    model = AdvantageModel()
    model.load_state_dict({"factor": {}, "moments": {}})
    batch = SimpleNamespace(model_scores=None, expected=torch.tensor([0.5]), categories=[None])
    assert model.transform(torch.tensor([1.5]), batch).tolist() == [1.0]


def _stored(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_in_ppo_it_is_bounded_as_trained():
    model = AdvantageModel(margin=2.0, margins={"code": 0.5})
    batch = SimpleNamespace(
        model_scores=None, expected=torch.tensor([0.5, 0.5, 0.5, -9.0]), categories=["chat", "code", "code", None]
    )
    found = model.transform(torch.tensor([1.0, 1.0, -8.0, 9.0]), batch)
    assert found.tolist() == [0.5, 0.5, -0.5, 2.0]
    with pytest.raises(UserError, match=r"needs a reward model with e\(x\)"):
        model.transform(torch.zeros(1), SimpleNamespace(model_scores=None, expected=None, categories=[None]))


def test_margins_follow_the_spread_of_their_category():
    model = AdvantageModel(margin=2.0, adapt="variance", std_band=(0.5, 1.0), rate=0.1)
    generator = torch.Generator().manual_seed(0)
    categories = ["wide", "narrow", "right"] * 20
    spread = torch.tensor([3.0, 0.1, 0.75] * 20)
    for _ in range(8):
        c, r = (torch.randn(60, generator=generator) * spread for _ in range(2))
        model.loss(PreferenceScores(c, r, torch.ones(60), categories, torch.zeros(60)))
    assert model.margins.std("wide") == pytest.approx(3, rel=0.1)  # from the first batch on: no bias towards zero
    wide, narrow, right = (model.margins.of(name) for name in ("wide", "narrow", "right"))
    assert wide == pytest.approx(2 * 0.9**8) and narrow == pytest.approx(2 * 1.1**8) and right == 2
    again = AdvantageModel(margin=2.0, adapt="variance")
    again.load_state_dict(model.state_dict())
    assert again.margins.of("wide") == wide and again.margins.std("narrow") == model.margins.std("narrow")
    with torch.no_grad():  # held-out pairs change nothing
        model.loss(PreferenceScores(9 * c, r, torch.ones(60), categories, torch.zeros(60)))
    assert model.margins.of("wide") == wide


@pytest.mark.parametrize(
    "options",
    [
        {"margin": 0},
        {"margins": {"code": -1.0}},
        {"std_band": (1.0, 0.5)},
        {"weight": 0.5},
        {"max_share": 1.0},
        {"marign": 2},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        AdvantageModel(**options)
