"""The loss of a reward model on soft labels, a pure function of tensors."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def soft_preference_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, p: torch.Tensor, margin: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Cross-entropy between a soft label and the Bradley-Terry probability (Lee et al. 2023, section 3.1).

    L = -[p log s(d) + (1 - p) log s(-d)] with d = chosen - rejected - margin and s the sigmoid. With p = 1
    it is exactly the Bradley-Terry loss.

    Args:
        chosen, rejected: (B,) float scores.
        p: (B,) float in [0, 1], probability that chosen is preferred.
        margin: (B,) or a number: how much better chosen must be.

    Returns:
        Mean over the batch, a scalar.
    """
    difference = chosen - rejected - margin
    return -(p * logsigmoid(difference) + (1 - p) * logsigmoid(-difference)).mean()
