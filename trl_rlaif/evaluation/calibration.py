"""Calibration of predicted probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A human choice as the outcome of "response_1 is better".
_OUTCOMES = {1: 1.0, 2: 0.0}


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
    return outcome_calibration_error(p, [_OUTCOMES.get(h) for h in human], bins=bins)


def outcome_calibration_error(p: Sequence[float], outcomes: Sequence[float | None], *, bins: int = 10) -> float | None:
    """The same against outcomes that are themselves probabilities, such as soft labels.

    With outcomes of 0 and 1 it is ``calibration_error``. A soft label must not be rounded to one of them first: the
    error would then fall as the predictions become more confident than the labels.

    Args:
        p: N probabilities that response_1 is preferred.
        outcomes: N numbers in [0, 1], how often response_1 is preferred; None leaves a pair out.
        bins: Of equal width over the confidences 0.5..1.

    Returns:
        In [0, 1]: mean over the pairs of |mean outcome - mean confidence| of their bins; None without pairs.
    """
    found = calibration_bins(p, outcomes, bins=bins)
    total = sum(n for *_, n in found)
    return sum(n / total * abs(outcome - confidence) for confidence, outcome, n in found) if found else None


def calibration_bins(
    p: Sequence[float], outcomes: Sequence[float | None], *, bins: int = 10
) -> list[tuple[float, float, int]]:
    """The bins of a reliability diagram.

    Args:
        p, outcomes, bins: As in ``outcome_calibration_error``.

    Returns:
        For each nonempty bin, in order of confidence: the mean of max(p, 1 - p), the mean outcome of the response that
        p prefers (0.5 if p prefers neither), and the number of pairs.
    """
    rows = [(x, y) for x, y in zip(p, outcomes, strict=True) if y is not None]
    if not rows:
        return []
    chance, outcome = np.array(rows, dtype=np.float64).T
    confidence = np.maximum(chance, 1 - chance)
    outcome = np.select([chance > 0.5, chance < 0.5], [outcome, 1 - outcome], 0.5)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    inside = [index == b for b in range(bins)]
    return [(float(confidence[i].mean()), float(outcome[i].mean()), int(i.sum())) for i in inside if i.any()]
