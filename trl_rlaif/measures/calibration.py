"""Whether a probability is right as often as it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def calibration_error(p: Sequence[float], human: Sequence[int | None], *, bins: int = 10) -> float | None:
    """Expected calibration error of the label's confidence (Guo et al. 2017, eq. 3).

    Args:
        p: N probabilities that response_1 is preferred.
        human: N choices: 1, 2, 0 for a tie or None for unknown; ties and unknowns are left out.
        bins: Of equal width over the confidences 0.5..1.

    Returns:
        In [0, 1]: mean over the pairs of |accuracy - confidence| of their bins; None without pairs. A label of
        exactly 0.5 counts half right.
    """
    counted = [(a, h) for a, h in zip(p, human, strict=True) if h in (1, 2)]
    if not counted:
        return None
    chosen = np.array([a for a, _ in counted])
    first = np.array([h == 1 for _, h in counted])
    confidence = np.maximum(chosen, 1 - chosen)
    right = np.where(chosen == 0.5, 0.5, (chosen > 0.5) == first)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)
