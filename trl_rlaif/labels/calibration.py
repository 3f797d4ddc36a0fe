"""Makes a judge's confidence mean what it says, from a few pairs that people judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_rlaif.errors import UserError
from trl_rlaif.measures import agreement, calibration_error

# Fewer say nothing about a temperature.
MIN_PAIRS = 20
FOLDS = 5
_EDGE = 1e-9


@dataclass(frozen=True)
class Calibration:
    """Log-odds l of response_1 become scale * l - bias where it is shown first, + bias where it is second.

    The label is then the mean over the orders. Labels without orders are scaled alone.

    Args:
        scale: 1 / temperature (Guo et al. 2017).
        bias: What standing first is worth, in nats.
    """

    scale: float = 1.0
    bias: float = 0.0

    @classmethod
    def fit(cls, rows: Sequence[dict[str, Any]], human: Sequence[int]) -> Calibration:
        """Maximum likelihood of the people's choices, each order of a pair an observation.

        Args:
            rows: Labels with p_12 and p_21 (one may be None), or with p alone.
            human: 1 or 2 for each.

        Raises:
            UserError: As ``check_choices``.
        """
        check_choices(human)
        return cls._likeliest(rows, human)

    @classmethod
    def _likeliest(cls, rows: Sequence[dict[str, Any]], human: Sequence[int]) -> Calibration:
        from sklearn.linear_model import LogisticRegression

        features, targets = [], []
        for row, choice in zip(rows, human, strict=True):
            for logit, first in _observations(row):
                features.append((logit, first))
                targets.append(choice == 1)
        model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
        scale, bias = model.fit(np.array(features), np.array(targets)).coef_[0]
        return cls(float(scale), -float(bias))

    def apply(self, row: dict[str, Any]) -> float:
        """The calibrated probability that response_1 is preferred."""
        logits = [self.scale * logit - self.bias * first for logit, first in _observations(row)]
        return _sigmoid(math.fsum(logits) / len(logits))


def check_choices(human: Sequence[int]) -> None:
    """Refuse what says too little.

    Raises:
        UserError: Fewer than 20 pairs, or one of the two choices occurs less than twice.
    """
    counts = Counter(human)
    if len(human) < MIN_PAIRS or min(counts[1], counts[2]) < 2:
        raise UserError(
            f"{len(human)} pairs with a person's choice ({counts[1]} for response 1, {counts[2]} for response 2) "
            "are too few to calibrate with.",
            fix=f"Give at least {MIN_PAIRS} pairs in label.calibration, two or more for each response.",
        )


def held_out(rows: Sequence[dict[str, Any]], human: Sequence[int], *, seed: int) -> dict[str, Any]:
    """Agreement and calibration error before and after, each pair calibrated without having been fitted to."""
    after = [0.0] * len(rows)
    # Dealt out by choice: whatever fold is left out, both choices remain.
    shuffled = sorted(np.random.default_rng(seed).permutation(len(rows)).tolist(), key=lambda i: human[i])
    for fold in range(FOLDS):
        test = shuffled[fold::FOLDS]
        train = sorted(set(shuffled) - set(test))
        fitted = Calibration._likeliest([rows[i] for i in train], [human[i] for i in train])
        for i in test:
            after[i] = fitted.apply(rows[i])
    before = [row["p"] for row in rows]
    return {
        name: {"agreement": agreement(p, human), "ece": calibration_error(p, human)}
        for name, p in (("before", before), ("after", after))
    }


def _observations(row: dict[str, Any]) -> list[tuple[float, int]]:
    """(log-odds of response_1, 1 where it is shown first, -1 where second, 0 where there are no orders)."""
    orders = [(row.get("p_12"), 1), (row.get("p_21"), -1)]
    known = [(_logit(p), first) for p, first in orders if p is not None]
    return known or [(_logit(row["p"]), 0)]


def _logit(p: float) -> float:
    p = min(max(p, _EDGE), 1 - _EDGE)
    return math.log(p) - math.log1p(-p)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
