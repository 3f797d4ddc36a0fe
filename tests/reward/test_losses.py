"""The loss on soft labels against float64 computations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from trl_rlaif.reward.losses import soft_preference_loss

CHOSEN = [2.0, -1.0, 0.3, 5.0, -7.5]
REJECTED = [1.0, 1.5, 0.3, -4.0, 8.0]
P = [1.0, 0.8, 0.5, 0.0, 0.25]


def by_hand(chosen, rejected, p, margin):
    """Mean cross-entropy between (p, 1 - p) and the Bradley-Terry probabilities."""
    total = 0.0
    for c, r, q, m in zip(chosen, rejected, p, margin, strict=True):
        d = c - r - m
        total -= q * -math.log1p(math.exp(-d)) + (1 - q) * -math.log1p(math.exp(d))
    return total / len(chosen)


def tensors(*lists, dtype=torch.float64):
    return [torch.tensor(values, dtype=dtype) for values in lists]


@pytest.mark.parametrize("margin", [[0.0] * 5, [1.5] * 5, [0.0, 0.1, 2.0, -1.0, 3.0]])
def test_equals_the_formula(margin):
    loss = soft_preference_loss(*tensors(CHOSEN, REJECTED, P, margin))
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(by_hand(CHOSEN, REJECTED, P, margin), rel=1e-12)


def test_the_margin_is_zero_by_default_and_may_be_a_number():
    three = tensors(CHOSEN, REJECTED, P)
    assert soft_preference_loss(*three).item() == pytest.approx(by_hand(CHOSEN, REJECTED, P, [0.0] * 5), rel=1e-12)
    assert soft_preference_loss(*three, 0.7).item() == pytest.approx(by_hand(CHOSEN, REJECTED, P, [0.7] * 5), rel=1e-12)


def test_a_margin_asks_more_of_the_chosen():
    one = tensors([1.0], [0.0], [1.0])
    assert soft_preference_loss(*one, 0.5) > soft_preference_loss(*one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hard_labels_give_the_bradley_terry_loss_to_the_last_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(64, generator=generator, dtype=torch.float64).mul(20).to(dtype) for _ in range(2))
    for margin in (0.0, torch.rand(64, generator=generator, dtype=torch.float64).to(dtype)):
        expected = -logsigmoid(chosen - rejected - margin).mean()
        assert torch.equal(soft_preference_loss(chosen, rejected, torch.ones(64, dtype=dtype), margin), expected)
    turned = soft_preference_loss(chosen, rejected, torch.zeros(64, dtype=dtype))
    assert torch.equal(turned, -logsigmoid(rejected - chosen).mean())


def test_swapping_the_responses_and_the_label_changes_nothing():
    chosen, rejected, p = tensors(CHOSEN, REJECTED, P)
    assert soft_preference_loss(chosen, rejected, p).item() == pytest.approx(
        soft_preference_loss(rejected, chosen, 1 - p).item(), rel=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("score", [1e4, -1e4])
def test_far_out_scores_give_finite_losses_and_gradients(dtype, p, score):
    chosen = torch.tensor([score], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-score], dtype=dtype, requires_grad=True)
    loss = soft_preference_loss(chosen, rejected, torch.tensor([p], dtype=dtype))
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    wrong = 1 - p if score > 0 else p  # the label's share on the losing side
    assert loss.item() == pytest.approx(2e4 * wrong, rel=0.02, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(wrong if score > 0 else -wrong, rel=0.02, abs=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("difference", [-3.0, 0.0, 0.5, 4.0])
def test_the_gradient_moves_the_probability_towards_the_label(p, difference):
    chosen = torch.tensor([difference, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    soft_preference_loss(chosen, rejected, torch.tensor([p, 1.0], dtype=torch.float64)).backward()
    expected = (1 / (1 + math.exp(-difference)) - p) / 2  # sigmoid(d) - p, over a batch of two
    assert chosen.grad[0].item() == pytest.approx(expected, abs=1e-12)
    assert rejected.grad[0].item() == pytest.approx(-expected, abs=1e-12)


def test_the_loss_is_least_where_the_probability_is_the_label():
    differences = torch.linspace(-6, 6, 241, dtype=torch.float64)
    for p in (0.1, 0.5, 0.85):
        label = torch.tensor([p], dtype=torch.float64)
        losses = [soft_preference_loss(d[None], torch.zeros(1, dtype=torch.float64), label).item() for d in differences]
        best = differences[losses.index(min(losses))].item()
        assert best == pytest.approx(math.log(p / (1 - p)), abs=0.05)


def test_gradient_check():
    three = [t.requires_grad_() for t in tensors(CHOSEN, REJECTED)]
    torch.autograd.gradcheck(lambda c, r: soft_preference_loss(c, r, torch.tensor(P, dtype=torch.float64), 0.4), three)
