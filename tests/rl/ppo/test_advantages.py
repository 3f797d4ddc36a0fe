"""Rewards, advantages and losses against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trl_rlaif.models import forward
from trl_rlaif.rl import reward_shaping
from trl_rlaif.rl.ppo import advantages as adv
from trl_rlaif.rl.ppo import losses

B, T, V = 5, 7, 11


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def _loop_gae(rewards, values, gamma, lam):
    advantages = np.zeros_like(rewards)
    for b in range(len(rewards)):
        following, next_value = 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            following = rewards[b, t] + gamma * next_value - values[b, t] + gamma * lam * following
            advantages[b, t], next_value = following, values[b, t]
    return advantages, advantages + values


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_gae_is_the_plain_loop(random, gamma, lam):
    rewards = torch.randn(B, T, generator=random, dtype=torch.float64)
    values = torch.randn(B, T, generator=random, dtype=torch.float64)
    for ours, theirs in zip(
        adv.gae(rewards, values, gamma, lam), _loop_gae(rewards.numpy(), values.numpy(), gamma, lam), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_without_discount_the_first_return_is_the_sum_of_rewards(random):
    rewards = torch.randn(B, T, generator=random)
    _, returns = adv.gae(rewards, torch.zeros(B, T), 1.0, 1.0)
    torch.testing.assert_close(returns[:, 0], rewards.sum(1))


def test_the_score_lands_behind_the_last_token_or_on_it():
    kl, scores = torch.ones(3, 4), torch.tensor([10.0, 20.0, 30.0])
    rewards = reward_shaping.token_rewards(kl, scores, torch.tensor([2, 4, 0]), kl_coef=0.5)
    expected = [[-0.5, -0.5, 9.5, -0.5], [-0.5, -0.5, -0.5, 19.5], [29.5, -0.5, -0.5, -0.5]]
    assert rewards.tolist() == expected


def test_kl_estimators():
    logprobs, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert reward_shaping.kl_per_token(logprobs, reference, "k1").tolist() == [[0.5, -1.0]]
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    assert reward_shaping.kl_per_token(logprobs, reference, "k3")[0].tolist() == pytest.approx(k3, rel=1e-6)


def test_k1_and_k3_estimate_the_same_kl(random):
    p = torch.randn(V, generator=random, dtype=torch.float64).log_softmax(0)
    q = torch.randn(V, generator=random, dtype=torch.float64).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        expected = (p.exp() * reward_shaping.kl_per_token(p, q, estimator)).sum()
        torch.testing.assert_close(expected, exact)


def test_whitening_uses_only_the_mask(random):
    values = torch.randn(B, T, generator=random, dtype=torch.float64)
    mask = torch.rand(B, T, generator=random) < 0.6
    inside = values[mask].numpy()
    whitened = adv.masked_whiten(values, mask)
    expected = (inside - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(whitened[mask], expected, rtol=1e-12)
    assert (whitened[~mask] == 0).all()
    kept = adv.masked_whiten(values, mask, shift_mean=False)
    np.testing.assert_allclose(kept[mask], expected + inside.mean(), rtol=1e-12)


def test_whitening_one_value_is_finite():
    assert adv.masked_whiten(torch.tensor([[3.0]]), torch.tensor([[True]])).isfinite().all()


def test_token_logprobs_and_entropy(random):
    logits = torch.randn(B, T, V, generator=random) * 3
    tokens = torch.randint(V, (B, T), generator=random)
    distribution = torch.distributions.Categorical(logits=logits.double() / 0.7)
    torch.testing.assert_close(
        forward.token_logprobs(logits, tokens, 0.7).double(), distribution.log_prob(tokens), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(forward.entropy(logits, 0.7).double(), distribution.entropy(), rtol=1e-5, atol=1e-5)


def test_policy_loss_is_the_plain_loop(random):
    new, old, advantages = (torch.randn(B, T, generator=random, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(B, T, generator=random) < 0.7
    total, clipped, count = 0.0, 0, 0
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
                plain, bounded = -a * ratio, -a * min(max(ratio, 0.8), 1.2)
                total, clipped, count = total + max(plain, bounded), clipped + (bounded > plain), count + 1
    loss, share = losses.policy_loss(new, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    assert share.item() == pytest.approx(clipped / count, rel=1e-6)


def test_value_loss_is_the_plain_loop(random):
    values, old, returns = (torch.randn(B, T, generator=random, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(B, T, generator=random) < 0.7
    total, clipped, count = 0.0, 0, 0
    for b in range(B):
        for t in range(T):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                plain, bounded = (v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2
                total, clipped, count = total + max(plain, bounded), clipped + (bounded > plain), count + 1
    loss, share = losses.value_loss(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(0.5 * total / count, rel=1e-12)
    assert share.item() == pytest.approx(clipped / count, rel=1e-6)
