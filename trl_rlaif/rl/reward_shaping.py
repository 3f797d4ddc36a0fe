"""From scores to per-token rewards: whitening, clipping, penalties, and the KL penalty with its coefficient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_rlaif.types import Responses


def shaped_scores(
    scores: torch.Tensor,
    responses: Responses,
    args: Any,
    ended: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """Scores whitened, clipped, and reduced by the penalties, in this order, each if ``args`` enable it.

    The penalties come last, so that clipping does not undo them.

    Args:
        scores: (B,) float32, after the reward transforms; NaN where a response has none.
        ended: (B,) bool; ``missing_eos_penalty`` applies to the others.
        gather: Joins the scores of all processes.

    Returns:
        (B,) float32, NaN where the scores are.
    """
    if args.whiten_scores:
        everyone = gather(scores)
        everyone = everyone[~everyone.isnan()]
    if args.whiten_scores and len(everyone):
        scores = (scores - everyone.mean()) * torch.rsqrt(everyone.var(correction=0) + 1e-8)
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    if args.missing_eos_penalty is not None:
        scores = torch.where(ended, scores, scores - args.missing_eos_penalty)
    if args.length_penalty:
        scores = scores - args.length_penalty * responses.lengths / args.response_length
    return scores


@dataclass
class AdaptiveKLController:
    """The KL coefficient, fixed or adapted to a target KL (Ziegler et al. 2019, sec. 2.2).

    Args:
        coef: Initial value.
        target: KL in nats per response, or None for a fixed coefficient.
        horizon: Episodes over which the maximum error changes the coefficient by a fifth.
        weighting: Of the objective, ``additive`` or ``weighted``: see ``PPOConfig``.
    """

    coef: float
    target: float | None
    horizon: int
    weighting: Literal["additive", "weighted"] = "additive"
    MOST = 0.2

    @property
    def score_weight(self) -> float:
        """The score's weight relative to the KL."""
        return 1 - self.coef if self.weighting == "weighted" else 1.0

    def observe(self, kl: float, episodes: int) -> None:
        """Adapt to the mean KL of this many responses."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -self.MOST), self.MOST)
            self.coef *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"kl_coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``."""
        self.coef = state["kl_coef"]


def kl_per_token(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: Literal["k1", "k3"]) -> torch.Tensor:
    """Estimate of KL(policy || reference) from each sampled token (Schulman, "Approximating KL divergence").

    Args:
        logprobs, ref_logprobs: (B, T) float, log-probabilities of the sampled tokens, in nats.
        estimator: k1 is log-ratio, unbiased; k3 is ratio - 1 - log-ratio, unbiased and never negative.

    Returns:
        (B, T), nats.
    """
    log_ratio = ref_logprobs - logprobs
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-kl_coef * KL on every token, plus the score where the response ends (Ziegler et al. 2019, eq. 2).

    The score is added at the step after the last token, or at the last one if the response fills the row.

    Args:
        kl: (B, T) nats, zero after the end.
        scores: (B,) float.
        lengths: (B,) int64, response tokens.

    Returns:
        (B, T).
    """
    rewards = -kl_coef * kl
    rows = torch.arange(len(rewards), device=rewards.device)
    rewards[rows, lengths.clamp(max=rewards.shape[1] - 1)] += scores
    return rewards
