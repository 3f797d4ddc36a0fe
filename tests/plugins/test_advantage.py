"""The Advantage Model against plain float64 loops, and its part in training and in PPO."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from trl_rlaif_advantage import AdvantageModel
from trl_rlaif_advantage.losses import advantage, advantage_loss

from trl_rlaif import PreferenceScores, UserError

N, MAX_RATIO = 3.0, 4.0


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
    return r - (N - 1) / N * e - sum(min(math.exp(x), MAX_RATIO) / N * r for x in log_ratios)


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
    model = AdvantageModel(margin=2.0, margins={"code": 0.7}, weight=N, max_ratio=MAX_RATIO)
    expected = _loss_by_hand(numbers, p, [0.7, 2.0, 2.0, 0.7, 2.0])
    assert model.loss(_scores(numbers, p, categories)).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_e_learns_from_the_bounding_terms_alone(k):
    numbers = _numbers(4, k, seed=1)
    for x in numbers.values():
        x.requires_grad_()
    options = {"weight": N, "max_ratio": MAX_RATIO}
    c, r = (
        advantage(numbers[name], numbers["expected"], numbers[f"{name}_log_ratios"], **options)
        for name in ("chosen", "rejected")
    )
    ranking = torch.nn.functional.logsigmoid(c - r).sum()
    assert torch.equal(torch.autograd.grad(ranking, numbers["expected"], retain_graph=True)[0], torch.zeros(4).double())
    p = torch.tensor([1.0, 0.8, 0.0, 0.5])
    (found,) = torch.autograd.grad(advantage_loss(c, r, p, 1.5), numbers["expected"])
    slope = -(N - 1) / N if k else -1.0  # of a by e
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
    assert advantage(r, e, torch.zeros(2, 0)).tolist() == [1.0, -3.0]


def test_in_ppo_it_is_bounded_as_trained():
    model = AdvantageModel(margin=2.0, margins={"code": 0.5})
    rollout = SimpleNamespace(expected=torch.tensor([0.5, 0.5, 0.5, -9.0]), categories=["chat", "code", "code", None])
    found = model.transform(torch.tensor([1.0, 1.0, -8.0, 9.0]), rollout)
    assert found.tolist() == [0.5, 0.5, -0.5, 2.0]
    with pytest.raises(UserError, match=r"needs a reward model with e\(x\)"):
        model.transform(torch.zeros(1), SimpleNamespace(expected=None, categories=[None]))


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
    with torch.no_grad():  # held-out pairs move nothing
        model.loss(PreferenceScores(9 * c, r, torch.ones(60), categories, torch.zeros(60)))
    assert model.margins.of("wide") == wide


@pytest.mark.parametrize(
    "options", [{"margin": 0}, {"margins": {"code": -1.0}}, {"std_band": (1.0, 0.5)}, {"weight": 0.5}, {"marign": 2}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        AdvantageModel(**options)
