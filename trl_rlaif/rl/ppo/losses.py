"""The losses of PPO (Schulman et al. 2017), pure functions of tensors."""

from __future__ import annotations

import torch


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate objective (eq. 7), to be minimised.

    Args:
        logprobs, old_logprobs, advantages: (B, T) float; old_logprobs and advantages without gradient.
        mask: (B, T) bool, True on response tokens.
        clip: Half-width of the ratio's interval around 1.
        count: Divisor of the sums; None: the mask's count. A part of a batch needs that of the whole batch.

    Returns:
        (loss, fraction of tokens where the clipped term decides), two scalars.
    """
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    count = mask.sum().clamp(min=1) if count is None else count
    return (torch.max(plain, clipped) * mask).sum() / count, ((clipped > plain) * mask).sum() / count


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error to the returns, pessimistic over a clipped change of the values.

    Args:
        values, old_values, returns: (B, T) float.
        mask: (B, T) bool, True on response tokens and on the step after the last.
        clip: Half-width of the interval around the old value.
        count: As in ``policy_loss``.

    Returns:
        (loss, fraction of steps where the clipped term decides), two scalars.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    count = mask.sum().clamp(min=1) if count is None else count
    return 0.5 * (torch.max(plain, clipped) * mask).sum() / count, ((clipped > plain) * mask).sum() / count
