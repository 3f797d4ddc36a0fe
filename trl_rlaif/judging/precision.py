"""The lowest precision of matrix products that leaves the labels unchanged, tested on a few questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["highest", "high", "medium"]

# Largest change of a probability that counts as rounding.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Probe:
    """The precisions tried.

    Args:
        precision: The choice, for ``torch.set_float32_matmul_precision``.
        deviation: Largest change of a probability under each precision tried, against "highest"; 1 for NaN.
    """

    precision: Precision
    deviation: dict[str, float]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Compute float32 matrix products with this precision inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_precision(probabilities: Callable[[], Sequence[float]]) -> Probe:
    """The lowest precision whose probabilities are within 1e-4 of those under the highest.

    What "medium" and "high" mean depends on the processor (bfloat16 in one or several passes, TF32), so the error is
    measured. Speed is not, so that a resumed run makes the same choice.
    """
    with matmul_precision("highest"):
        exact = probabilities()
    deviation: dict[str, float] = {}
    for precision in ("medium", "high"):
        with matmul_precision(precision):
            found = probabilities()
        off = [abs(a - b) for a, b in zip(found, exact, strict=True)]
        deviation[precision] = max((1.0 if math.isnan(x) else x for x in off), default=0.0)
        if deviation[precision] <= TOLERANCE:
            return Probe(precision, deviation)
    return Probe("highest", deviation)
