"""The distribution regulator: no kind of prompt is worth more than another (Peng et al. 2023)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from pydantic import Field

from trl_rlaif import Options, RewardTransform, Rollout
from trl_rlaif_regulator.running import POOLED, RunningScores

logger = logging.getLogger(__name__)

# Below this a category's scores are all alike, and there is nothing to scale.
LEAST_STD = 1e-3


class RegulatorOptions(Options):
    """What can be set in a recipe."""

    bound: float = Field(3.0, gt=0, description="Scores end within so many standard deviations: bound tanh(z / bound).")
    share: float = Field(0.0005, gt=0, lt=1, description="Of one new score in the running mean and variance.")
    prior: float = Field(16.0, ge=0, description="All categories' figures count as this many scores of each.")
    warm_up: int = Field(2, ge=0, description="Batches in which all categories are scaled alike, by pooled figures.")
    drift: float = Field(1.0, gt=0, description="Alarm: a category's mean has risen by so many standard deviations ...")
    kl_budget: float = Field(
        10.0, gt=0, description="... while its KL to the reference, in nats a response, is above this."
    )


class DistributionRegulator(RewardTransform):
    """Shifts, scales and bounds each category's scores by its running mean and variance."""

    Options = RegulatorOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.running = RunningScores(self.options.share, self.options.prior)
        self.batches = 0
        self.start: dict[str, tuple[float, float]] = {}
        self.unit: float | None = None
        self._numbers: dict[str, float] = {}

    def transform(self, scores: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """(B,) float32, in which all categories have mean 0 and the same variance, at the start 1 at most.

        Every process takes in every process's scores, so that all regulate alike.
        """
        kl = ((rollout.logprobs - rollout.ref_logprobs) * rollout.masks()[0]).sum(1)
        rows = gather_object(list(zip(rollout.categories, scores.tolist(), kl.tolist(), strict=True)))
        self.running.add((category, score) for category, score, _ in rows)
        self.batches += 1
        self._watch(rows)
        known = self.batches > self.options.warm_up
        figures = [self.running.figures(category if known else None) for category in rollout.categories]
        mean, std = torch.tensor(figures, device=scores.device, dtype=scores.dtype).view(-1, 2).unbind(1)
        scaled = (scores - mean) / std.clamp(min=LEAST_STD)
        return self._spread() * self.options.bound * torch.tanh(scaled / self.options.bound)

    def _spread(self) -> float:
        """What a standard deviation of a category becomes: the same for all of them.

        The scores' own spread, brought down to 1 where it is above that once it is known. From then on it follows the
        scores: were it always 1, ever more would be paid for ever smaller differences as a policy learns and its
        scores come closer together, against the same price of a KL.
        """
        spread, known = self.running.within()
        if self.unit is None and known and self.batches >= max(1, self.options.warm_up):
            self.unit = max(spread, 1.0)
        return spread / (self.unit or max(spread, 1.0))

    def metrics(self) -> dict[str, float]:
        """Running mean and standard deviation of each category before regulation, and 1 where it drifts."""
        return self._numbers

    def state_dict(self) -> dict[str, Any]:
        return {
            "running": self.running.state_dict(),
            "batches": self.batches,
            "start": dict(self.start),
            "unit": self.unit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running.load_state_dict(state["running"])
        self.batches, self.start, self.unit = state["batches"], dict(state["start"]), state.get("unit")

    def _watch(self, rows: list[tuple[str | None, float, float]]) -> None:
        """Signs of reward hacking: the score of a kind of prompt rises while its KL budget is overdrawn."""
        if self.batches == max(1, self.options.warm_up):
            self.start = {name: self.running.own(name) for name in self.running.moments}
        self._numbers = {}
        for name in self.running.moments:
            mean, std = self.running.own(name)
            label = name or "all"
            self._numbers |= {f"regulator/{label}/mean": mean, f"regulator/{label}/std": std}
            if name == POOLED:
                continue
            began, spread = self.start.setdefault(name, (mean, std))
            kls = [kl for category, _, kl in rows if category == name]
            over = bool(kls) and sum(kls) / len(kls) > self.options.kl_budget
            drifts = over and mean - began > self.options.drift * max(spread, LEAST_STD)
            self._numbers[f"regulator/{name}/drift"] = float(drifts)
            if drifts:
                logger.warning(
                    "Scores of '%s' have risen from %.2f to %.2f while the policy is %.1f nats from the reference: "
                    "it may be gaming the reward.",
                    name,
                    began,
                    mean,
                    sum(kls) / len(kls),
                )
