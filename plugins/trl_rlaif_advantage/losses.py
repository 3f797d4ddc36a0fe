"""The Advantage Model's formulas (Peng et al. 2023), pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid


def ratio_share(log_ratios: torch.Tensor, weight: float, max_share: float) -> torch.Tensor:
    """The part of r taken by other policies' importance weights: sum_k (1 / N) (pi / pi'_k), bounded.

    The remainder, 1 minus this share, must stay positive: a ratio above N would reverse the ranking. Therefore,
    the ratios of a response are scaled down jointly until their sum is at most N * max_share.

    Args:
        log_ratios: log pi(y|x) - log pi'_k(y|x) of whole responses, (B, K) float.
        weight: N, the weight of the current policy, at least 1.
        max_share: In (0, 1).

    Returns:
        (B,) float32 in [0, max_share].
    """
    share = log_ratios.float().logsumexp(-1) - math.log(weight)
    return share.clamp(max=math.log(max_share)).exp()


def advantage(
    reward: torch.Tensor, expected: torch.Tensor, share: torch.Tensor | float = 0.0, weight: float | None = None
) -> torch.Tensor:
    """Reward of a response relative to the expected reward of its prompt (Peng et al. 2023, section 3.1).

    a = (1 - share) r - ((N - 1) / N) e; without other policies, r - e.

    Args:
        reward: r(x, y), (B,) float.
        expected: e(x), (B,) float.
        share: Result of ``ratio_share``, (B,), or a number in [0, 1).
        weight: N, the weight of the current policy, at least 1; None without other policies.

    Returns:
        (B,) float32.
    """
    part = 1.0 if weight is None else (weight - 1) / weight
    return (1 - share) * reward.float() - part * expected.float()


def advantage_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, p: torch.Tensor, margin: torch.Tensor | float
) -> torch.Tensor:
    """Ranking loss with two terms that bound the preferred response below +m and the other above -m.

    L = -[log s(a_c - a_r) + log s(m - a_c) + log s(m + a_r)], in both directions, weighted by p and 1 - p.

    Args:
        chosen, rejected: a(x, y), (B,) float.
        p: (B,) float in [0, 1], probability that chosen is preferred.
        margin: m(x) > 0, (B,) or a number.

    Returns:
        Mean over the batch, a scalar, float32.
    """
    chosen, rejected, p = chosen.float(), rejected.float(), p.float()

    def direction(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
        return logsigmoid(better - worse) + logsigmoid(margin - better) + logsigmoid(margin + worse)

    return -(p * direction(chosen, rejected) + (1 - p) * direction(rejected, chosen)).mean()
