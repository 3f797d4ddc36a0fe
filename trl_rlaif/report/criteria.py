"""Reads the criteria of labels: of each pair, and aggregated over all pairs of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trl_rlaif.report.formatting import label, number
from trl_rlaif.report.parsing import both, probability

# Rubrics may have different criteria for every prompt.
MAX_CRITERIA = 30
_LONGEST = 200


@dataclass(frozen=True)
class ByCriterion:
    """A pair's result on one criterion.

    Args:
        p: Probability that response 1 is better, if the responses are compared on it.
        scores: Probability that each response meets it, or its rating, if each response is judged separately.
    """

    criterion: str
    weight: float
    p: float | None
    scores: tuple[float, float] | None
    veto: bool = False

    @property
    def lead(self) -> float | None:
        """Above 0 if the criterion favors response 1, below 0 if it favors response 2."""
        if self.scores is not None:
            return (1.0 if self.veto else self.weight) * (self.scores[0] - self.scores[1])
        return None if self.p is None else self.p - 0.5


@dataclass(frozen=True)
class CriterionTotal:
    """A criterion aggregated over all pairs that have it.

    Args:
        pairs: Number of these pairs.
        score: Mean over both responses; None if responses are compared on it.
        veto: Whether it must hold, instead of having a weight.
        agreeing: Fraction of the pairs, ties excluded, whose label prefers the same response; None if all are ties.
    """

    criterion: str
    weight: float
    pairs: int
    score: float | None
    agreeing: float | None
    veto: bool = False


def by_criterion(row: dict[str, Any]) -> list[ByCriterion]:
    """The criteria of a label; empty if it has none or they cannot be read."""
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
    """Aggregate the criteria of labels, given with their p; the most frequent criteria first."""
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
