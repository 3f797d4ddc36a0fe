"""Criteria for responses worth rehearsing, alone or as a weighted mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trl_rlaif import Pool, UserError


def _advantage(pool: Pool) -> np.ndarray:
    return pool.scores.numpy()


def _entropy(pool: Pool) -> np.ndarray:
    assert pool.entropies is not None  # every pool drawn in RL has them
    return -pool.entropies.numpy()  # confident responses first


def _length(pool: Pool) -> np.ndarray:
    return np.array([len(ids) for ids in pool.response_ids])


def _human(pool: Pool) -> np.ndarray:
    values = pool.columns.get("human")
    if values is None or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise UserError(
            "The criterion 'human' needs a column 'human' with a number for every prompt.",
            fix="Add the column to the prompts, or choose another criterion.",
        )
    return np.array(values)


def _random(pool: Pool) -> np.ndarray:
    return np.random.default_rng(pool.seed).random(len(pool))


CRITERIA: dict[str, Callable[[Pool], np.ndarray]] = {
    "advantage": _advantage,
    "entropy": _entropy,
    "length": _length,
    "human": _human,
    "random": _random,
}


def worth(pool: Pool, criterion: str | Mapping[Any, float]) -> np.ndarray:
    """Value of each row for rehearsal, (N,) float64; higher is better.

    Args:
        criterion: A name: advantage (the pool's score), entropy (the lower the better), length (in tokens), human
            (the column), random. Or weights by name: each criterion is then standardized over the pool before it is
            weighted, and a negative weight reverses it.
    """
    if isinstance(criterion, str):
        return CRITERIA[criterion](pool).astype(np.float64)
    total = np.zeros(len(pool))
    for name, weight in criterion.items():
        values: np.ndarray = CRITERIA[name](pool).astype(np.float64)
        total += weight * (values - values.mean()) / (values.std() or 1.0)
    return total
