"""Lessons: pairs with a known target that a judge can be taught."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trl_rlaif.types import Label, Pair

# Lower bound of the probability that a certain but wrong judge gave to the truth.
_EDGE = 1e-9


@dataclass(frozen=True)
class Lesson:
    """A pair and its target.

    Args:
        pair: Two responses.
        p: The probability that the first one is the better one.
        source: Where the target comes from.
        ratings: Another judge's probabilities of the ratings, for each of the two responses. If given, they are the
            target: ``p`` follows from them.
    """

    pair: Pair
    p: float
    source: str
    ratings: tuple[Sequence[float], Sequence[float]] | None = None

    def loss(self, label: Label) -> float:
        """Cross-entropy in nats of a label with the target: averaged over both ratings, or that of p."""
        if self.ratings is not None and label.ratings_1 is not None and label.ratings_2 is not None:
            both = zip(self.ratings, (label.ratings_1, label.ratings_2), strict=True)
            return sum(_cross_entropy(known, said) for known, said in both) / 2
        if label.p is None:
            raise ValueError(f"The pair {label.id} was not judged.")
        return _cross_entropy((self.p, 1 - self.p), (label.p, 1 - label.p))


def _cross_entropy(known: Sequence[float], said: Sequence[float]) -> float:
    return -math.fsum(share * math.log(max(given, _EDGE)) for share, given in zip(known, said, strict=True))
