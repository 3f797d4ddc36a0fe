"""Formatting of benchmark tables over several seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(values: Sequence[float], digits: int) -> str:
    """Mean over seeds and half of its 95% t-interval; only the mean for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
