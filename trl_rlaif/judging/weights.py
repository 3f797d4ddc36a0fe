"""Weights of criteria, which are represented exactly."""

from __future__ import annotations

import math

from trl_rlaif.errors import UserError

# Weights are whole multiples of 1 / SCALE, so that sums of them are exact and the scores that can occur are few.
SCALE = 100
LARGEST = 1000


def check_weight(weight: float, what: str) -> None:
    """Reject a weight that cannot be represented exactly.

    Args:
        weight: Weight of a criterion.
        what: What it belongs to, for the error message.

    Raises:
        UserError: It is not a number from -1000 to 1000 with up to two decimals, or it is 0.
    """
    number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
    if not (number and math.isclose(weight * SCALE, round(weight * SCALE)) and 0 < abs(weight) <= LARGEST):
        fix = f"Write a number from -{LARGEST} to {LARGEST} with up to two decimals, not 0."
        raise UserError(f"The weight of {what} is {weight!r}.", fix=fix)
