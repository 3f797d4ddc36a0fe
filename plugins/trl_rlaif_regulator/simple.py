"""Simple reward transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from trl_rlaif import Options, RewardTransform, ScoredBatch, UserError

if TYPE_CHECKING:
    import torch


class ClipOptions(Options):
    """Options in a recipe."""

    low: float = Field(-5.0, description="Lower bound of scores.")
    high: float = Field(5.0, description="Upper bound of scores.")

    @model_validator(mode="after")
    def _ordered(self) -> ClipOptions:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        return self


class Clip(RewardTransform):
    """Clips scores to [low, high]."""

    Options = ClipOptions
    options: ClipOptions

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        return scores.clamp(self.options.low, self.options.high)


class Whiten(RewardTransform):
    """Gives the scores of each batch, over all processes, zero mean and unit variance."""

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        import torch
        from accelerate.utils import gather_object

        # In float64: the rounding of a float32 mean, divided by the spread of equal scores, would be noise.
        every = torch.tensor(gather_object(scores.tolist()), dtype=torch.float64)
        white = (scores.cpu().double() - every.mean()) / (every.std(correction=0) + 1e-8)
        return white.to(scores)


class EnsembleOptions(Options):
    """Options in a recipe."""

    join: Literal["mean", "min", "pessimistic"] = Field("pessimistic", description="pessimistic: mean - k std.")
    k: float = Field(1.0, ge=0, description="Number of standard deviations subtracted with pessimistic.")


class Ensemble(RewardTransform):
    """Combines several rewards to prevent over-optimization of a single one (Coste et al. 2023).

    It uses the individual rewards, weighted and normalized, so it comes first. If a response lacks some of them,
    it combines the others. Rewards of weight 0 are only logged and have no effect.
    """

    Options = EnsembleOptions
    options: EnsembleOptions

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """(B,) float32.

        Raises:
            UserError: Only one reward has a weight other than 0.
        """
        import torch

        if len(batch.parts) < 2:
            raise UserError(
                "ensemble needs two rewards or more, of a weight other than 0.", fix="Name them in rl.rewards."
            )
        parts = torch.stack(list(batch.parts.values()))
        if self.options.join == "min":
            return parts.nan_to_num(torch.inf).amin(0)
        mean = parts.nanmean(0)
        if self.options.join == "mean":
            return mean
        return mean - self.options.k * ((parts - mean) ** 2).nanmean(0).sqrt()


class LengthPenaltyOptions(Options):
    """Options in a recipe."""

    per_token: float = Field(0.001, description="Penalty per token beyond free; a negative value is a bonus.")
    free: int = Field(0, ge=0, description="Response tokens without a penalty.")


class LengthPenalty(RewardTransform):
    """Penalizes long responses per token or, with a negative penalty, keeps responses from shrinking."""

    Options = LengthPenaltyOptions
    options: LengthPenaltyOptions

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        beyond = (batch.lengths - self.options.free).clamp(min=0).to(scores.device)
        return scores - self.options.per_token * beyond
