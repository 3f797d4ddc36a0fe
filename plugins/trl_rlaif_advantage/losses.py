"""The Advantage Model's formulas (Peng et al. 2023), pure functions of tensors."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def advantage(
    reward: torch.Tensor,
    expected: torch.Tensor,
    log_ratios: torch.Tensor | None = None,
    *,
    weight: float = 2.0,
    max_ratio: float = 10.0,
) -> torch.Tensor:
    """What a response earns over what is expected for its prompt.

    a = r - ((N - 1) / N) e - sum_k (1 / N) (pi / pi'_k) r; without other policies r - e.

    Args:
        reward: r(x, y), (B,) float.
        expected: e(x), (B,) float.
        log_ratios: log pi(y|x) - log pi'_k(y|x) of whole responses, (B, K) float, or None for K = 0.
        weight: N, the weight of the current policy, at least 1.
        max_ratio: Importance weights pi / pi'_k are at most this; clipped before they are exponentiated.

    Returns:
        (B,) float32.
    """
    reward, expected = reward.float(), expected.float()
    if log_ratios is None or log_ratios.shape[-1] == 0:
        return reward - expected
    ratios = log_ratios.float().clamp(max=torch.tensor(max_ratio).log().item()).exp()
    return reward - (weight - 1) / weight * expected - ratios.sum(-1) / weight * reward


def advantage_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, p: torch.Tensor, margin: torch.Tensor | float
) -> torch.Tensor:
    """Ranking, and two terms that keep the preferred response below +m and the other above -m.

    L = -[log s(a_c - a_r) + log s(m - a_c) + log s(m + a_r)], in both directions, weighed by p and 1 - p.

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
