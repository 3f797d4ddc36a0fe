"""Responses without a reward: how many there are, why, and when a run stops because of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trl_rlaif.progress import say
from trl_rlaif.validation import RewardError

# What share of an update has failed is judged over so many responses at least: of 8, a single one is more than 10%.
FEWEST = 100


class Unscored:
    """Counts, over all processes, the responses without a reward and the failures of each reward function.

    Args:
        limit: Share of responses, 0 to 1, that may have no reward, and that each function may fail to score: of an
            update, or of the last ``FEWEST`` responses where an update has fewer.

    Attributes:
        total: Responses without a reward since the run began.
        share: The same of what was seen last, as a share of it.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.total, self.share = limit, 0, 0.0
        self._recent: deque[tuple[int, Counter[str]]] = deque()
        self._reasons: dict[str, str] = {}
        self._warned = False

    def observe(self, scores: torch.Tensor, failed: Mapping[str, Sequence[str]]) -> None:
        """Take account of some responses.

        Args:
            scores: (B,) float32, NaN where there is no reward.
            failed: By reward function, why it could not score responses, a text each.
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
        """What ends the run, where too many failed of late."""
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
        """Count from here on, but for the total: a run that is resumed is not stopped for what failed before."""
        self._recent.clear()

    def check(self) -> None:
        """Stop where too many failed of late.

        Raises:
            RewardError: Says how many, why, and what to do.
        """
        error = self.error()
        if error is not None:
            raise error

    def state_dict(self) -> dict[str, Any]:
        """What was counted, the same in all processes."""
        return {"total": self.total, "recent": [(size, dict(counts)) for size, counts in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.total = state["total"]
        self._recent = deque((size, Counter(counts)) for size, counts in state["recent"])
