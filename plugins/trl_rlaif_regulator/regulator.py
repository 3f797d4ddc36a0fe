"""The distribution regulator: equalizes the reward distributions of prompt categories (Peng et al. 2023)."""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from dataclasses import astuple
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trl_rlaif import Options, RewardTransform, ScoredBatch
from trl_rlaif_regulator.drift import Rise
from trl_rlaif_regulator.running import RunningScores

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Lower bound on the standard deviation to divide by: below it, a category's scores are practically equal.
LEAST_STD = 1e-3
# Weight of a new score in the statistics of a pool: so small that all scores count equally.
_ALL_ALIKE = 1e-9
# Name of the scores without a category in metrics.
UNNAMED = "unnamed"
# Category, score, KL and prompt (as a number) of a response.
Row = tuple[str | None, float, float, int]


class RegulatorOptions(Options):
    """Options in a recipe."""

    bound: float = Field(3.0, gt=0, description="Bound on scores in standard deviations: bound tanh(z / bound).")
    share: float = Field(0.0005, gt=0, lt=1, description="Weight of a new score in the running mean and variance.")
    prior: float = Field(
        16.0,
        ge=0,
        description="Maximum weight, in scores, of other categories' statistics; less if the categories differ.",
    )
    warm_up: int = Field(
        2, ge=0, description="Initial batches in which all categories are scaled by pooled statistics."
    )
    drift: float = Field(
        0.5,
        gt=0,
        description="Alarm if a category's mean has risen significantly, by this many standard deviations or more, ...",
    )
    kl_budget: float = Field(
        10.0, gt=0, description="... while its KL to the reference is above this, in nats per response."
    )


class DistributionRegulator(RewardTransform):
    """Shifts, scales and bounds each category's scores by its running mean and standard deviation."""

    Options = RegulatorOptions
    options: RegulatorOptions
    needs_kl = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.running = RunningScores(self.options.share, self.options.prior)
        self.batches = 0
        self.rises: dict[str | None, Rise] = {}
        self.unit: float | None = None
        self._numbers: dict[str, float] = {}

    def transform(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """(B,) float32: all categories have mean 0 and the same variance, initially at most 1.

        Scores are gathered over all processes, so all have the same statistics.
        """
        self._take(scores, batch)
        if self.batches <= self.options.warm_up:
            figures = dict.fromkeys(batch.categories, self.running.pooled())
        else:
            table = self.running.table()
            figures = {category: table[category or None] for category in set(batch.categories)}
        spread = self._spread(self.running, settled=self.batches >= max(1, self.options.warm_up))
        return self._mapped(scores, [figures[category] for category in batch.categories], spread)

    def transform_pool(self, scores: torch.Tensor, batch: ScoredBatch) -> torch.Tensor:
        """The same with the statistics of the pool alone, independent of the running statistics."""
        rows = self._take(scores, batch)
        pool = RunningScores(_ALL_ALIKE, self.options.prior)
        pool.add((category, score) for category, score, _, _ in rows)
        table = pool.table()
        figures = [table[category or None] for category in batch.categories]
        return self._mapped(scores, figures, self._spread(pool, settled=True))

    def _take(self, scores: torch.Tensor, batch: ScoredBatch) -> list[Row]:
        """Update with the scores of all processes, and return them."""
        from accelerate.utils import gather_object

        prompts = [zlib.crc32(repr(prompt).encode()) for prompt in batch.prompts]
        rows = gather_object(list(zip(batch.categories, scores.tolist(), batch.kl.tolist(), prompts, strict=True)))
        self.running.add((category, score) for category, score, _, _ in rows)
        self.batches += 1
        self._watch(rows)
        return rows

    def _mapped(self, scores: torch.Tensor, figures: list[tuple[float, float]], spread: float) -> torch.Tensor:
        mean, std = scores.new_tensor(figures).view(-1, 2).unbind(1)
        scaled = (scores - mean) / std.clamp(min=LEAST_STD)
        return spread * self.options.bound * (scaled / self.options.bound).tanh()

    def _spread(self, running: RunningScores, *, settled: bool) -> float:
        """Standard deviation of the regulated scores, the same for all categories.

        It is the spread within categories, divided by the first known spread if that is above 1. It then follows the
        scores: if it were always 1, ever smaller score differences would be amplified as the policy learns and its
        scores converge, against an unchanged KL penalty.
        """
        spread, known = running.within()
        if self.unit is None and known and settled:
            self.unit = max(spread, 1.0)
        return spread / (self.unit or max(spread, 1.0))

    def metrics(self) -> dict[str, float]:
        """Running mean and standard deviation of each category before regulation, and 1 if it drifts."""
        return self._numbers

    def state_dict(self) -> dict[str, Any]:
        return {
            "running": self.running.state_dict(),
            "batches": self.batches,
            "rises": {category: astuple(rise) for category, rise in self.rises.items()},
            "unit": self.unit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running.load_state_dict(state["running"])
        self.batches, self.unit = state["batches"], state.get("unit")
        self.rises = {category: Rise(*values) for category, values in state.get("rises", {}).items()}

    # ---- Signs of reward hacking: the scores of a category rise while it exceeds its KL budget ------------------

    def _watch(self, rows: list[Row]) -> None:
        """Update the drift test with the scores of all processes, and warn about rising categories."""
        kinds: dict[str | None, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for category, score, kl, prompt in rows:
            kinds[category or None][prompt].append((score, kl))
        for category, prompts in kinds.items():
            rise = self.rises.setdefault(category, Rise())
            # In pseudorandom order (by hash): a pool has the data's order, which may go from hard to easy.
            for prompt in sorted(prompts):
                rise.add(fmean(score for score, _ in prompts[prompt]))
        self._numbers = {}
        for name in self.running.moments:
            mean, std = self.running.own(name)
            self._numbers |= {f"regulator/{name or 'all'}/mean": mean, f"regulator/{name or 'all'}/std": std}
        for category, rise in self.rises.items():
            kls = [kl for responses in kinds[category].values() for _, kl in responses]
            drifts = bool(kls) and self._drifts(rise, fmean(kls))
            self._numbers[f"regulator/{category or UNNAMED}/drift"] = float(drifts)
            if drifts and not rise.raised:
                rise.raised = True
                logger.warning(
                    "Scores of '%s' have risen from %.2f to %.2f while the policy is %.1f nats per response from the "
                    "reference: it may be exploiting the reward.",
                    category or UNNAMED,
                    rise.start,
                    rise.recent,
                    fmean(kls),
                )

    def _drifts(self, rise: Rise, kl: float) -> bool:
        return kl > self.options.kl_budget and rise.size >= self.options.drift and rise.significant(len(self.rises))
