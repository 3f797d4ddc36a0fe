"""Margins by category that adapt to the spread of a category's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Margins stay within this factor of their initial values.
RANGE = 4.0
# Weight of one batch in the running moments.
SHARE = 0.05


class AdaptiveMargins:
    """Margins by category, adapted to the running variance of the category's advantages.

    If the standard deviation of a category is above ``band``, its margin shrinks slightly with every batch; below,
    it grows. A narrower margin pulls the scores together.

    Args:
        start: Initial margins by category; ``default`` for all others.
        band: Range of standard deviations that change nothing.
        rate: Relative change of a margin per batch.
    """

    def __init__(self, start: Mapping[Any, float], default: float, band: tuple[float, float], rate: float) -> None:
        self.start, self.default, self.band, self.rate = start, default, band, rate
        self.factor: dict[str, float] = {}
        self._moments: dict[str, list[float]] = {}  # weight, mean, mean square

    def of(self, category: str | None) -> float:
        """The margin of a category."""
        return self.start.get(category, self.default) * self.factor.get(_name(category), 1.0)

    def std(self, category: str | None) -> float:
        """Running standard deviation of a category's advantages; NaN before the first."""
        weight, mean, square = self._moments.get(_name(category), (0.0, 0.0, 0.0))
        return math.sqrt(max(square / weight - (mean / weight) ** 2, 0.0)) if weight else math.nan

    def observe(self, batch: list[tuple[str | None, list[float]]]) -> None:
        """Update with a batch: the category of each prompt and the advantages of its responses."""
        rows: dict[str, list[float]] = {}
        for category, values in batch:
            rows.setdefault(_name(category), []).extend(values)
        low, high = self.band
        for name, values in rows.items():
            moments = self._moments.setdefault(name, [0.0, 0.0, 0.0])
            found = (1.0, sum(values) / len(values), sum(v * v for v in values) / len(values))
            # The running weight corrects for the initialization at zero, as in Adam.
            moments[:] = [(1 - SHARE) * old + SHARE * new for old, new in zip(moments, found, strict=True)]
            std = self.std(name or None)
            step = 1 - self.rate if std > high else 1 + self.rate if std < low else 1.0
            self.factor[name] = min(max(self.factor.get(name, 1.0) * step, 1 / RANGE), RANGE)

    def state_dict(self) -> dict[str, Any]:
        """Factors and running moments."""
        return {"factor": dict(self.factor), "moments": {k: list(v) for k, v in self._moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.factor, self._moments = dict(state["factor"]), {k: list(v) for k, v in state["moments"].items()}


def _name(category: str | None) -> str:
    return category or ""
