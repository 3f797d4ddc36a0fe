"""The Advantage Model as a reward transform: its loss in reward training, its bounded scores in PPO."""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from pydantic import Field, field_validator

from trl_rlaif import Options, PreferenceScores, RewardTransform, Rollout, UserError
from trl_rlaif_advantage.losses import advantage, advantage_loss
from trl_rlaif_advantage.margins import AdaptiveMargins


class AdvantageOptions(Options):
    """What can be set in a recipe."""

    margin: float = Field(4.0, gt=0, description="m: a preferred response is kept below +m, the other above -m.")
    margins: dict[str, float] = Field({}, description="m of some categories; the others take margin.")
    adapt: Literal["fixed", "variance"] = Field("fixed", description="variance: m follows each category's spread.")
    std_band: tuple[float, float] = Field((0.6, 1.2), description="Spread that adapt: variance leaves alone.")
    rate: float = Field(0.02, gt=0, lt=1, description="Relative change of m in one batch under adapt: variance.")
    weight: float = Field(2.0, ge=1, description="N: the current policy's weight against others (log-ratio columns).")
    max_ratio: float = Field(10.0, gt=0, description="Importance weights are at most this.")

    @field_validator("margins")
    @classmethod
    def _positive(cls, margins: dict[str, float]) -> dict[str, float]:
        if any(not m > 0 for m in margins.values()):
            raise ValueError("every margin must be above 0")
        return margins

    @field_validator("std_band")
    @classmethod
    def _ordered(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not 0 < band[0] < band[1]:
            raise ValueError("the band must be two numbers, 0 < low < high")
        return band


class AdvantageModel(RewardTransform):
    """Learns a(x, y) = r(x, y) - e(x), bounded on every kind of prompt (Peng et al. 2023)."""

    Options = AdvantageOptions
    needs_expected = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        chosen = self.options
        self.margins = AdaptiveMargins(chosen.margins, chosen.margin, chosen.std_band, chosen.rate)

    def loss(self, scores: PreferenceScores) -> torch.Tensor:
        """The three-term loss, a scalar. With ``adapt: variance`` the margins move while gradients are recorded."""
        options = {"weight": self.options.weight, "max_ratio": self.options.max_ratio}
        chosen = advantage(scores.chosen, scores.expected, scores.chosen_log_ratios, **options)
        rejected = advantage(scores.rejected, scores.expected, scores.rejected_log_ratios, **options)
        margins = self._margins(scores.categories, chosen.device)
        if self.options.adapt == "variance" and torch.is_grad_enabled():
            # Every process sees every batch, so that all have the same margins.
            rows = zip(scores.categories, torch.stack((chosen, rejected), 1).detach().tolist(), strict=True)
            self.margins.observe(gather_object(list(rows)))
        return advantage_loss(chosen, rejected, scores.p, margins)

    def transform(self, scores: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """r - e within plus and minus m, (B,) float32: what lies beyond has never been trained.

        Raises:
            UserError: The reward model has no e(x).
        """
        if rollout.expected is None:
            raise UserError(
                "advantage needs a reward model with e(x), which this one has not.",
                fix="Train it with reward: {transforms: [advantage]}, or leave advantage out of rl.transforms.",
            )
        margins = self._margins(rollout.categories, scores.device)
        return advantage(scores, rollout.expected).clamp(-margins, margins)

    def state_dict(self) -> dict[str, Any]:
        return self.margins.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.margins.load_state_dict(state)

    def _margins(self, categories: list[str | None], device: torch.device) -> torch.Tensor:
        return torch.tensor([self.margins.of(category) for category in categories], device=device)
