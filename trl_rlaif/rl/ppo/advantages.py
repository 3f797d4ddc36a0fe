"""Advantages and returns from per-token rewards: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), and returns.

    Args:
        rewards, values: (B, T); must be zero after the end.
        gamma, lam: Discount and lambda, in [0, 1].

    Returns:
        (advantages, returns), (B, T) each; returns = advantages + values.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fraction of the returns' variance that the values explain: 1 is perfect, 0 is as good as a constant.

    0 without any returns.
    """
    returns, errors = returns[mask], (returns - values)[mask]
    if not len(returns):
        return values.new_zeros(())
    return 1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-12)


def masked_whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """Values scaled to unit variance (unbiased) over the mask, optionally with zero mean; zero outside the mask.

    Args:
        total: Sums a scalar over all processes, to whiten over all of them.
    """
    count = total(mask.sum().to(values.dtype)).clamp(min=1)
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0)
