"""Reads rubrics from the data, and scores responses by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_rlaif import ScoreDistribution, UserError, check_weight, weighted_sum

NOTHING_TO_GAIN = "A rubric has no criterion of positive weight."
# Keys of a criterion's text and weight: here, in HealthBench, and in the data of Rubrics as Rewards.
_TEXTS, _WEIGHTS = ("criterion", "description"), ("weight", "points")


@dataclass(frozen=True)
class Criterion:
    """A criterion that a response meets or not.

    Args:
        text: A statement about the response, such as "names the capital".
        weight: A multiple of 0.01 from -1000 to 1000, except 0. Below 0, the response should not meet the criterion.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise UserError(f"A criterion is {self.text!r}.", fix="Write a statement that a response meets or not.")
        check_weight(self.weight, f"the criterion {self.text!r}")


def read_rubric(value: Any) -> list[Criterion]:
    """The criteria of a rubric in the data's format.

    Args:
        value: A list whose entries are a text (weight 1) or a mapping with the ``criterion`` (also ``description``)
            and its ``weight`` (also ``points``). Other keys, such as HealthBench's tags, are ignored.

    Raises:
        UserError: It is not a rubric, or an entry is not a criterion.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(
            f"A rubric is {_shown(value)}.", fix="Write a list: [{criterion: names the capital, weight: 2}]."
        )
    return [_criterion(entry) for entry in value]


def _criterion(entry: Any) -> Criterion:
    if isinstance(entry, str | Criterion):
        return entry if isinstance(entry, Criterion) else Criterion(entry)
    # If some rows of a dataset lack a key, Arrow sets it to None.
    known = {key: item for key, item in entry.items() if item is not None} if isinstance(entry, Mapping) else {}
    texts, weights = ([known[key] for key in keys if key in known] for keys in (_TEXTS, _WEIGHTS))
    if len(texts) != 1 or len(weights) > 1:
        raise UserError(
            f"A criterion of a rubric is {_shown(entry)}.", fix="Write a text, or {criterion: its text, weight: 1}."
        )
    return Criterion(texts[0], *weights)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def grade(rubric: Sequence[Criterion], met: Sequence[float]) -> ScoreDistribution:
    """Score of a response, given the probability that each criterion is met.

    The score is HealthBench's (Arora et al. 2025, arXiv 2505.08775): the sum of the weights of the criteria met
    divided by the sum of all positive weights, here clipped to [0, 1] for each response. If all weights are positive,
    its mean is the weighted fraction met, sum(weight * p) / sum(weight) (Gunjal et al. 2025, "Rubrics as Rewards",
    arXiv 2507.17746, explicit aggregation).

    Args:
        rubric: At least one criterion of positive weight.
        met: Probabilities in [0, 1] that each criterion is met, assumed independent.

    Raises:
        UserError: No weight is positive.
    """
    if not any(criterion.weight > 0 for criterion in rubric):
        raise UserError(NOTHING_TO_GAIN, fix="Add what a good response should meet.")
    found = weighted_sum([criterion.weight for criterion in rubric], [(1 - p, p) for p in met])
    return found.at_least(0.0).between(0.0, 1.0)
