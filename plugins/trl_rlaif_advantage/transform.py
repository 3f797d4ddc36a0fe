"""The Advantage Model as a reward transform: its loss in reward training, its bounded scores in PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from trl_rlaif import Options, PreferenceScores, RewardTransform, ScoredBatch, UserError
from trl_rlaif_advantage.margins import AdaptiveMargins

if TYPE_CHECKING:  # imported on use: checking a recipe does not need torch
    import torch


class AdvantageOptions(Options):
    """Options in a recipe."""

    margin: float = Field(
        4.0, gt=0, description="Margin m: bounds preferred responses below +m and rejected ones above -m."
    )
    margins: dict[str, float] = Field({}, description="Margins by category; other categories use margin.")
    adapt: Literal["fixed", "variance"] = Field(
        "fixed", description="variance: the margin follows each category's spread."
    )
    std_band: tuple[float, float] = Field(
        (0.6, 1.2), description="Range of spreads for which adapt: variance keeps the margin."
    )
    rate: float = Field(0.02, gt=0, lt=1, description="Relative change of the margin per batch with adapt: variance.")
    weight: float = Field(
        2.0, ge=1, description="N: the current policy's weight relative to other policies (log-ratio columns)."
    )
    max_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Maximum part of r that other policies' importance weights take; 1 would reverse its sign.",
    )

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
    """Learns a(x, y) = r(x, y) - e(x), bounded in every category of prompts (Peng et al. 2023).

    Trained with the log-ratios of other policies, a is (1 - share) r - ((N - 1) / N) e, and RL uses the same. The
    share reweights a response of another policy. RL's responses are the policy's own, and the other policies are
    not loaded, so the mean share of the training responses is used. Using r instead of (1 - share) r would move the
    mean of a away from 0, by an amount that depends on the prompt.
    """

    Options = AdvantageOptions
    options: AdvantageOptions
    needs_expected = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        chosen = self.options
        self.margins = AdaptiveMargins(chosen.margins, chosen.margin, chosen.std_band, chosen.rate)
        # After training with other policies: N, and the sum and the number of the responses' shares.
        self._trained: dict[str, float] = {}

    def loss(self, scores: PreferenceScores) -> torch.Tensor:
        """The three-term loss, a scalar. While gradients are recorded, the statistics that RL needs are updated."""
        import torch
        from accelerate.utils import gather_object

        from trl_rlaif_advantage.losses import advantage, advantage_loss

        *shares, weight = self._shares(scores)
        chosen, rejected = (
            advantage(score, scores.expected, share, weight)
            for score, share in zip((scores.chosen, scores.rejected), shares, strict=True)
        )
        margins = self._margins(scores.categories, chosen.device)
        if self.options.adapt == "variance" and torch.is_grad_enabled():
            # Every process sees every batch, so all have the same margins.
            rows = zip(scores.categories, torch.stack((chosen, rejected), 1).detach().tolist(), strict=True)
            self.margins.observe(gather_object(list(rows)))
        return advantage_loss(chosen, rejected, scores.p, margins)

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """Scores with the reward model's r(x, y) replaced by a(x, y), (B,) float32.

        a is clipped to plus and minus m: values beyond were never trained. It has the weight of r; other rewards
        are unchanged.

        Raises:
            UserError: The reward model has no e(x).
        """
        from trl_rlaif_advantage.losses import advantage

        if batch.expected is None:
            raise UserError(
                "advantage needs a reward model with e(x), which this one does not have.",
                fix="Train it with reward: {transforms: [advantage]}, or leave advantage out of rl.transforms.",
            )
        margins = self._margins(batch.categories, scores.device)
        trained = self._trained
        share = trained["share"] / trained["responses"] if trained else 0.0
        if batch.model_scores is None:
            return advantage(scores, batch.expected, share, trained.get("weight")).clamp(-margins, margins)
        paid = advantage(batch.model_scores, batch.expected, share, trained.get("weight")).clamp(-margins, margins)
        others = scores - batch.parts.get("model", 0)
        return others + batch.model_scale * paid

    def state_dict(self) -> dict[str, Any]:
        return self.margins.state_dict() | {"policies": dict(self._trained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.margins.load_state_dict(state)
        self._trained = dict(state.get("policies", {}))  # older states have none: the reward is r - e

    def _shares(self, scores: PreferenceScores) -> tuple[torch.Tensor | float, torch.Tensor | float, float | None]:
        """Shares of r taken by other policies' ratios (chosen, rejected), and N; (0, 0, None) without such policies."""
        import torch
        from accelerate.utils import gather_object

        from trl_rlaif_advantage.losses import ratio_share

        ratios, weight = (scores.chosen_log_ratios, scores.rejected_log_ratios), self.options.weight
        if ratios[0] is None or not ratios[0].shape[-1]:
            return 0.0, 0.0, None
        chosen, rejected = (ratio_share(x, weight, self.options.max_share) for x in ratios)
        if torch.is_grad_enabled():
            found = gather_object([((chosen + rejected).sum().item(), 2 * len(chosen))])
            share, responses = (sum(column) for column in zip(*found, strict=True))
            known = self._trained or {"share": 0.0, "responses": 0}
            share, responses = known["share"] + share, known["responses"] + responses
            self._trained = {"weight": weight, "share": share, "responses": responses}
        return chosen, rejected, weight

    def _margins(self, categories: list[str | None], device: torch.device) -> torch.Tensor:
        import torch

        return torch.tensor([self.margins.of(category) for category in categories], device=device)
