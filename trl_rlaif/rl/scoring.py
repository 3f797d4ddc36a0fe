"""From responses to scores: reward model and functions, their weighted sum, transforms, and unscored responses."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trl_rlaif.components import RewardTransform, numbered
from trl_rlaif.distributed import failing_together
from trl_rlaif.errors import UserError
from trl_rlaif.progress import say
from trl_rlaif.rl.metrics import category_spreads
from trl_rlaif.rl.reward_functions import MODEL, RewardFunc, call_rewards, reward_names
from trl_rlaif.rl.reward_shaping import shaped_scores
from trl_rlaif.rl.reward_sum import RewardSum
from trl_rlaif.types import Responses, ScoredBatch
from trl_rlaif.validation import RewardError, validated

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_rlaif.responses import ResponseReader
    from trl_rlaif.rl.ppo.config import PPOConfig

# Minimum number of responses over which the failure rate is computed: of 8, a single one is more than 10%.
FEWEST = 100

ModelScores = Callable[[Responses], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Scores:
    """The rewards of B responses. Arithmetic acts on ``total`` only.

    Args:
        total: (B,) float32, NaN where a response has no reward.
        raw: (B,) float32 by reward, before weights and normalization; NaN where a response lacks it.
        parts: (B,) float32 by reward, weighted and normalized: the terms of ``total``.
        model_scale: How much one unit of the reward model's score adds to the sum.
        expected: (B,) float32, e(x) of a reward model that has such a head.
        failed: By reward function, the reasons why it could not score responses, one text each.
        spreads: By step, how far the categories' means differ (``category_spreads``); set by the transforms.
    """

    total: torch.Tensor
    raw: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    model_scale: float = 1.0
    expected: torch.Tensor | None = None
    failed: dict[str, list[str]] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Scores | torch.Tensor) -> Scores:
        """From the result of a step whose override may return a tensor."""
        return found if isinstance(found, Scores) else cls(found)

    @property
    def scored(self) -> torch.Tensor:
        """(B,) bool, True where a response has a reward."""
        return ~self.total.isnan()

    def with_total(self, total: torch.Tensor) -> Scores:
        """A copy with other totals, such as clamped ones: ``scores.with_total(scores.total.clamp(-5, 5))``."""
        return replace(self, total=total)

    def __mul__(self, factor: Any) -> Scores:
        return self.with_total(self.total * factor)

    def __truediv__(self, factor: Any) -> Scores:
        return self.with_total(self.total / factor)

    def __add__(self, bonus: Any) -> Scores:
        return self.with_total(self.total + bonus)

    def __sub__(self, bonus: Any) -> Scores:
        return self.with_total(self.total - bonus)

    def __rsub__(self, bonus: Any) -> Scores:
        return self.with_total(bonus - self.total)

    def __neg__(self) -> Scores:
        return self.with_total(-self.total)

    __rmul__, __radd__ = __mul__, __add__


class RewardPipeline:
    """All rewards of a run. Its state between batches is in ``state_dict``.

    Args:
        functions: With GRPOTrainer's signature.
        transforms: Applied to the sum in this order.
        model: The reward model, if any: (B,) float32 scores of a batch of responses, and its e(x) or None.
        args: Weights, normalization, limits, whitening, clipping and penalties.
        reader: Its stop tokens end a response.
        accelerator: Gathers over all processes.

    Raises:
        UserError: The weights do not match the rewards.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunc],
        transforms: Sequence[RewardTransform],
        model: ModelScores | None,
        args: PPOConfig,
        reader: ResponseReader,
        accelerator: Accelerator,
    ) -> None:
        self.functions, self.transforms = list(functions), [validated(transform) for transform in transforms]
        self.model, self.args, self.reader, self.accelerator = model, args, reader, accelerator
        self.sum = RewardSum(self.names, args.reward_weights, args.reward_normalization, accelerator.gather)
        self.unscored = Unscored(args.max_failed)

    @property
    def names(self) -> list[str]:
        """Of all rewards, as in the metrics: the reward model's, then the functions'."""
        return reward_names(self.functions, model=self.model is not None)

    @property
    def needs_kl(self) -> bool:
        """Whether a transform reads the KL."""
        return any(transform.needs_kl for transform in self.transforms)

    @torch.no_grad()
    def score(self, responses: Responses, **extra: Any) -> Scores:
        """The summed rewards of the responses.

        Args:
            extra: Further arguments for the reward functions.

        Raises:
            UserError: As ``call_rewards``, or the reward model returned a score that is not finite.
        """
        with failing_together(self.accelerator):
            found, expected = [], None
            if self.model is not None:
                scores, expected = self.model(responses)
                if not scores.isfinite().all():
                    raise UserError("The reward model gave a score that is not finite.")
                found.append(scores)
            device, timeout = self.accelerator.device, self.args.reward_timeout
            called = call_rewards(self.functions, responses, timeout=timeout, **extra)
            raw = dict(zip(self.names, [*found, *(scores.to(device) for scores in called)], strict=True))
            names = self.names[len(found) :]
            failed = {name: list(getattr(f, "failed", ())) for name, f in zip(names, self.functions, strict=True)}
        return self._summed(raw, expected, {name: reasons for name, reasons in failed.items() if reasons})

    def _summed(
        self, raw: dict[str, torch.Tensor], expected: torch.Tensor | None, failed: dict[str, list[str]]
    ) -> Scores:
        total, parts, scale = self.sum(raw)
        return Scores(total, raw, parts, scale, expected, failed)

    def joined(self, found: Sequence[Scores], before: dict[str, Any]) -> Scores:
        """A pool's batches as one, summed again, since rewards are normalized over the whole pool.

        Args:
            found: Of each batch.
            before: ``sum.state_dict()`` from before the first of them.
        """
        if not found[0].raw:
            return Scores(torch.cat([scores.total for scores in found]))
        self.sum.load_state_dict(before)
        raw = {name: torch.cat([scores.raw[name] for scores in found]) for name in found[0].raw}
        expected = None if found[0].expected is None else torch.cat([scores.expected for scores in found])
        return self._summed(raw, expected, {})

    def observe(self, scores: Scores) -> None:
        """Count the responses without a reward."""
        self.unscored.observe(scores.total, scores.failed)

    def transform(self, scores: Scores, responses: Responses, kl: torch.Tensor, *, pool: bool = False) -> Scores:
        """Apply the transforms in their order, then whitening, clipping and penalties.

        Transforms see only the responses that have a reward; the scores of the others stay NaN.

        Args:
            kl: (B,) float32, nats per response; NaN where it is unknown.
            pool: These are all scores of a selector's pool, not a batch to train on.
        """
        known, total, spreads = scores.scored, scores.total, {}
        if self.transforms and self.accelerator.gather(known).any():
            seen = ScoredBatch(
                responses.prompts,
                responses.completions,
                responses.lengths,
                kl,
                responses.columns,
                scores.parts,
                scores.raw.get(MODEL),
                scores.model_scale,
                scores.expected,
            )
            seen, found = (seen, total) if known.all() else (seen.select(known), total[known])
            steps = {"raw": found.tolist()}
            for transform in self.transforms:
                found = (transform.transform_pool if pool else transform.transform)(found, seen)
                steps[numbered(type(transform).__name__, steps)] = found.tolist()
            spreads = category_spreads(seen.categories, steps)
            total = total.masked_scatter(known, found)
        ended = responses.ended
        if not self.reader.stop_ids:  # as in TRL, an end within a response counts
            ended = (responses.response_ids == self.reader.tokenizer.eos_token_id).any(1)
        total = shaped_scores(total, responses, self.args, ended, self.accelerator.gather)
        return replace(scores, total=total, spreads=spreads)

    def take_metrics(self, scores: Scores) -> dict[str, float]:
        """Statistics of the scores since the last call, and the spreads and transforms' metrics of the last batch.

        ``rollout/unscored`` is the fraction of responses without a reward; see ``RewardSum`` and ``category_spreads``.
        """
        metrics = {"rollout/unscored": self.unscored.share} | scores.spreads | self.sum.take_metrics()
        for transform in self.transforms:
            metrics |= transform.metrics()
        return metrics

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the state on exit: scoring inside leaves no trace."""
        before = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """The state of rewards and transforms, as plain values that later scoring does not change."""
        transforms = [copy.deepcopy(transform.state_dict()) for transform in self.transforms]
        return {"transforms": transforms, "rewards": self.sum.state_dict(), "unscored": self.unscored.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``.

        Raises:
            UserError: It belongs to other reward transforms.
        """
        if len(state["transforms"]) != len(self.transforms):
            raise UserError("The checkpoint was written with other reward transforms.")
        for transform, its_state in zip(self.transforms, state["transforms"], strict=True):
            transform.load_state_dict(its_state)
        if "rewards" in state:  # checkpoints of earlier versions have neither
            self.sum.load_state_dict(state["rewards"])
            self.unscored.load_state_dict(state["unscored"])


class Unscored:
    """Counts, over all processes, the responses without a reward and the failures of each reward function.

    Args:
        limit: Fraction of responses, 0 to 1, that may have no reward, and that each function may fail to score: of
            an update, or of the last ``FEWEST`` responses if an update has fewer.

    Attributes:
        total: Responses without a reward since the run began.
        share: Fraction without a reward among the responses last observed.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.total, self.share = limit, 0, 0.0
        self._recent: deque[tuple[int, Counter[str]]] = deque()
        self._reasons: dict[str, str] = {}
        self._warned = False

    def observe(self, scores: torch.Tensor, failed: Mapping[str, Sequence[str]]) -> None:
        """Count some responses.

        Args:
            scores: (B,) float32, NaN where a response has no reward.
            failed: By reward function, the reasons why it could not score responses, one text each.
        """
        counts = Counter({"": int(scores.isnan().sum())} | {name: len(reasons) for name, reasons in failed.items()})
        first = {name: reasons[0] for name, reasons in failed.items()}
        found = gather_object([(len(scores), counts, first)])
        size, counts = sum(n for n, _, _ in found), sum((c for _, c, _ in found), Counter())
        for _, _, reasons in found:
            self._reasons = reasons | self._reasons
        if counts.total() and not self._warned and PartialState().is_main_process:
            self._warned = True
            say(f"Warning: {self._found(counts, size)} Responses without a reward are not trained on.")
        self.total += counts[""]
        self.share = counts[""] / size
        self._recent.append((size, counts))
        while len(self._recent) > 1 and self._size() - self._recent[0][0] >= FEWEST:
            self._recent.popleft()

    def _size(self) -> int:
        return sum(size for size, _ in self._recent)

    def error(self) -> RewardError | None:
        """The error that ends the run, if too many failed recently."""
        counts, size = sum((counts for _, counts in self._recent), Counter()), self._size()
        if not any(count > self.limit * max(size, FEWEST) for count in counts.values()):
            return None
        return RewardError(
            f"{self._found(counts, size)} That is more than max_failed allows ({self.limit:.0%}).",
            fix="Repair what fails, add a reward that covers these responses, or raise max_failed. The last checkpoint "
            "holds what was learned until then; --resume continues from it.",
        )

    def _found(self, counts: Counter[str], size: int) -> str:
        """How many failed and why, in words."""
        failed = [f"'{name}' failed for {counts[name]}: {why}." for name, why in self._reasons.items() if counts[name]]
        what = f"{counts['']} of the last {size} responses have no reward."
        return " ".join([what, *(failed or ["The reward functions returned None."])])

    def forget(self) -> None:
        """Reset all counts except the total: a resumed run is not stopped for earlier failures."""
        self._recent.clear()

    def check(self) -> None:
        """Stop if too many failed recently.

        Raises:
            RewardError: With how many, why, and what to do.
        """
        error = self.error()
        if error is not None:
            raise error

    def state_dict(self) -> dict[str, Any]:
        """The counts, the same in all processes."""
        return {"total": self.total, "recent": [(size, dict(counts)) for size, counts in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``."""
        self.total = state["total"]
        self._recent = deque((size, Counter(counts)) for size, counts in state["recent"])
