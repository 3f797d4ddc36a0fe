"""Reads what labels say by each criterion: of a pair, and over all pairs of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trl_rlaif.report.formatting import label, number
from trl_rlaif.report.parsing import both, probability

# Rubrics may have other criteria for every prompt.
MAX_CRITERIA = 30
_LONGEST = 200


@dataclass(frozen=True)
class ByCriterion:
    """A pair by one criterion.

    Args:
        p: Probability that response 1 is better, where the responses are compared by it.
        scores: Probability that each response meets it, or its rating, where it is asked about each response.
    """

    criterion: str
    weight: float
    p: float | None
    scores: tuple[float, float] | None
    veto: bool = False

    @property
    def lead(self) -> float | None:
        """Above 0 where the criterion speaks for response 1, below 0 where it speaks for response 2."""
        if self.scores is not None:
            return (1.0 if self.veto else self.weight) * (self.scores[0] - self.scores[1])
        return None if self.p is None else self.p - 0.5


@dataclass(frozen=True)
class CriterionTotal:
    """A criterion over all pairs that have it.

    Args:
        pairs: How many.
        score: Mean over both responses; None where responses are compared by it.
        veto: Whether it must hold, in place of a weight.
        agreeing: Share of the pairs whose label prefers the same response, without ties; None if there are only ties.
    """

    criterion: str
    weight: float
    pairs: int
    score: float | None
    agreeing: float | None
    veto: bool = False


def by_criterion(row: dict[str, Any]) -> list[ByCriterion]:
    """The criteria of a label; none of a label without, or where they cannot be read."""
    entries, found = row.get("criteria"), []
    for entry in entries if isinstance(entries, list) else ():
        weight = number(entry.get("weight")) if isinstance(entry, dict) else None
        if weight is not None:
            scores, p = both(entry, "score_1", "score_2"), probability(entry.get("p"))
            found.append(
                ByCriterion(label(entry.get("criterion"), _LONGEST), weight, p, scores, entry.get("veto") is True)
            )
    return found


def totals(labels: Iterable[tuple[float, list[ByCriterion]]]) -> list[CriterionTotal]:
    """The criteria of labels with their p, the most frequent ones first."""
    known: dict[tuple[str, float, bool], list[tuple[float, ByCriterion]]] = {}
    for p, criteria in labels:
        for one in criteria:
            known.setdefault((one.criterion, one.weight, one.veto), []).append((p - 0.5, one))
    return [_total(*key, of) for key, of in sorted(known.items(), key=lambda item: -len(item[1]))]


def _total(criterion: str, weight: float, veto: bool, of: list[tuple[float, ByCriterion]]) -> CriterionTotal:
    scores = [score for _, one in of for score in one.scores or ()]
    same = [label * one.lead > 0 for label, one in of if label and one.lead]
    mean, agreeing = (fmean(values) if values else None for values in (scores, same))
    return CriterionTotal(criterion, weight, len(of), mean, agreeing, veto)
