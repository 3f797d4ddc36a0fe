"""Running mean and variance of each category's scores, steadied by those of all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

POOLED = ""
UNNAMED = None  # in a state
# Degrees of freedom from which a spread is known well enough (to about a fifth).
ENOUGH = 16


@dataclass
class Moments:
    """Exponentially weighted mean and variance, corrected for their start at nothing.

    A batch's scores come in together: with ``share`` s of a new score, n of them replace 1 - (1 - s)^n of the past.
    Sums of weights stand beside the weighted sums, which is the bias correction of Adam (Kingma and Ba 2015).
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, values: list[float], share: float) -> None:
        """Take in a batch of scores, at least one."""
        keep = (1 - share) ** len(values)
        mean, square = sum(values) / len(values), sum(v * v for v in values) / len(values)
        self.weight = keep * self.weight + 1 - keep
        self.total = keep * self.total + (1 - keep) * mean
        self.squares = keep * self.squares + (1 - keep) * square
        self.count += len(values)

    @property
    def mean(self) -> float:
        return self.total / self.weight

    @property
    def second(self) -> float:
        """Mean square."""
        return self.squares / self.weight


class RunningScores:
    """Mean and standard deviation of the scores of each category.

    Args:
        share: Of one new score in the running figures, 0 < share < 1.
        prior: The pooled figures count as much as this many scores of a category, so that one with few is near them
            and an unseen one has them.
    """

    def __init__(self, share: float, prior: float) -> None:
        self.share, self.prior = share, prior
        self.moments: dict[str, Moments] = {}
        self.unnamed = Moments()  # of the scores without a category

    def add(self, scores: Iterable[tuple[str | None, float]]) -> None:
        """Take in a batch of scores with their categories."""
        rows: dict[str, list[float]] = defaultdict(list)
        scores = list(scores)
        for category, score in scores:
            rows[POOLED].append(score)
            if category:
                rows[category].append(score)
        for name, values in rows.items():
            self.moments.setdefault(name, Moments()).add(values, self.share)
        unnamed = [score for category, score in scores if not category]
        if unnamed:
            self.unnamed.add(unnamed, self.share)

    def own(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a known category alone."""
        moments = self.moments[name]
        return moments.mean, math.sqrt(max(moments.second - moments.mean**2, 0.0))

    def within(self) -> tuple[float, bool]:
        """Standard deviation of the scores about their own category's mean, 0 before the first.

        Returns:
            It, and whether it comes from enough scores; until then it is that of all scores together.
        """
        own = [m for name, m in self.moments.items() if name != POOLED] + [self.unnamed]
        counts = [min(m.count, 1 / self.share) for m in own]
        free = sum(max(n - 1, 0) for n in counts)
        if free < ENOUGH:
            return (self.own(POOLED)[1] if POOLED in self.moments else 0.0), False
        squares = sum(n * (m.second - m.mean**2) for n, m in zip(counts, own, strict=True) if n > 1)
        return math.sqrt(max(squares / free, 0.0)), True

    def figures(self, category: str | None) -> tuple[float, float]:
        """Mean and standard deviation of a category, drawn towards the pooled ones.

        As if ``prior`` of the scores behind a mean and a variance had been the pooled ones.
        """
        pooled = self.moments.get(POOLED)
        if pooled is None:
            return 0.0, 1.0
        own = self.moments.get(category or POOLED, pooled)
        spread = pooled.second - pooled.mean**2
        # What the running figures remember, at most: a category of long ago is still known as well as a fresh one.
        count = min(own.count, 1 / self.share) if own is not pooled else 0.0
        part = count / (count + self.prior) if count + self.prior else 0.0
        mean = part * own.mean + (1 - part) * pooled.mean
        variance = part * (own.second - own.mean**2) + (1 - part) * spread
        return mean, math.sqrt(max(variance, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """The figures of every category."""
        found = {name: (m.weight, m.total, m.squares, m.count) for name, m in self.moments.items()}
        u = self.unnamed
        return found | {UNNAMED: (u.weight, u.total, u.squares, u.count)} if u.count else found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.moments = {name: Moments(*values) for name, values in state.items() if name != UNNAMED}
        self.unnamed = Moments(*state.get(UNNAMED, ()))
