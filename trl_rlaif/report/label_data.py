"""Reads labels.jsonl with the pairs that it is about: which labels are the run's own, and what they say."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_rlaif.report.criteria import ByCriterion, CriterionTotal, by_criterion, totals
from trl_rlaif.report.formatting import label, section
from trl_rlaif.report.jury import Verdict
from trl_rlaif.report.parsing import Turn, lines, probability, spread, turn, turns

# Each holds up to two rationales, so that more would make the page heavy.
MAX_LABELED = 30
_MAX_RATIONALES = 3


@dataclass(frozen=True)
class Rationale:
    """What a judge wrote before its answer; ``swapped`` where it was shown response 2 first."""

    swapped: bool
    turn: Turn


@dataclass(frozen=True)
class LabeledPair:
    """A pair with its label; probabilities are that response 1 is preferred, None where they are not known."""

    category: str
    prompt: list[Turn]
    responses: tuple[Turn, Turn]
    p: float
    p_12: float | None
    p_21: float | None
    human: int | None
    rationales: list[Rationale]
    criteria: list[ByCriterion]
    votes: list[tuple[str, float]]


@dataclass
class Labels:
    """What labels.jsonl says: confidences in 0.5..1 and the winner's table, keyed (order 1-2, order 2-1).

    ``answers`` holds (p, human choice) where a person chose 1 or 2; ``pairs`` some labeled pairs, evenly spaced.
    ``criteria`` are those that labels consist of, over all pairs. ``second`` counts the labels that prefer response 2.
    """

    total: int = 0
    confidences: list[float] = field(default_factory=list)
    winners: dict[tuple[int, int], int] = field(default_factory=lambda: {(1, 1): 0, (1, 2): 0, (2, 1): 0, (2, 2): 0})
    ties: int = 0
    second: int = 0
    answers: list[tuple[float, int]] = field(default_factory=list)
    pairs: list[LabeledPair] = field(default_factory=list)
    criteria: list[CriterionTotal] = field(default_factory=list)


def read_labels(
    path: Path,
    results: dict[str, Any],
    pairs: list[dict[str, Any]],
    notes: list[str],
    ranked: dict[str, float],
    jury: dict[str, Verdict],
) -> Labels:
    """The run's own labels, one a pair: the file may also hold those of other labelers, and of pairs that are gone.

    Args:
        ranked: What a ranking says of pairs, by their ids.
        jury: What a jury says of them, likewise.
    """
    labels, known = Labels(), []
    for row, pair in _of_jury(jury, pairs) if jury else _own(path, results, pairs, notes, ranked):
        labels.total += 1
        p, p_12, p_21 = (probability(row.get(key)) for key in ("p", "p_12", "p_21"))
        if p is not None:
            labels.confidences.append(max(p, 1 - p))
            labels.second += p < 0.5
            known.append((row, pair))
            if _human(pair):
                labels.answers.append((p, pair["human"]))
        if p_12 is None or p_21 is None:
            continue
        if p_12 == 0.5 or p_21 == 0.5:
            labels.ties += 1
        else:
            labels.winners[(1 if p_12 > 0.5 else 2, 1 if p_21 > 0.5 else 2)] += 1
    labels.criteria = totals((row["p"], by_criterion(row)) for row, _ in known)
    shown = [k for k in known if k[1]]
    if jury:
        shown.sort(key=lambda k: -(k[0]["disagreement"] or 0.0))
    labels.pairs = [_labeled(row, pair) for row, pair in (shown[:MAX_LABELED] if jury else spread(shown, MAX_LABELED))]
    return labels


def _of_jury(jury: dict[str, Verdict], pairs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A jury's label of each pair. Orders and rationales are its members' own."""
    found = ((jury.get(str(pair.get("id"))), pair) for pair in pairs)
    return [(vars(verdict), pair) for verdict, pair in found if verdict is not None]


def _own(
    path: Path, results: dict[str, Any], pairs: list[dict[str, Any]], notes: list[str], ranked: dict[str, float]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each label with its pair, which is empty where it is not known."""
    setup, columns = (section(results, "label").get(key) for key in ("setup", "columns"))
    latest = {}
    for row in lines(path, notes):
        if setup is None:
            latest[str(row.get("id"))] = row
        elif row.get("setup") == setup:
            latest[str(row.get("pair"))] = row
    if setup is None:
        by_id = {str(pair.get("id")): pair for pair in pairs}
        return [(row, by_id.get(id, {})) for id, row in latest.items()]
    if ranked:
        found = ((_joined(pair, latest, ranked.get(str(pair.get("id"))), columns or ()), pair) for pair in pairs)
        return [(row, pair) for row, pair in found if row["p"] is not None]
    # A label is its pair's by the texts: the id in its line is what some pair with these texts was once called.
    return [(latest[key], pair) for key, pair in ((_key(pair, columns or ()), pair) for pair in pairs) if key in latest]


def _joined(
    pair: dict[str, Any], latest: dict[str, dict[str, Any]], p: float | None, columns: Collection[str]
) -> dict[str, Any]:
    """A ranked pair's label. A tournament asks about each order by itself: the other one is the turned pair's."""
    row = latest.get(_key(pair, columns), {}) | {"p": p}
    turned = pair | {"response_1": pair.get("response_2"), "response_2": pair.get("response_1")}
    other = latest.get(_key(turned, columns), {})
    p_21 = probability(other.get("p_12"))
    if row.get("p_21") is None and p_21 is not None:
        row |= {"p_21": 1 - p_21, "rationale_21": other.get("rationale_12")}
    return row


def _key(pair: dict[str, Any], columns: Collection[str]) -> str:
    """A pair as labels.jsonl knows it; an empty string where the line is no pair."""
    from trl_rlaif.data import Pair
    from trl_rlaif.labels.store import pair_key

    try:
        return pair_key(Pair("", pair["prompt"], pair["response_1"], pair["response_2"], extra=pair), columns)
    except (KeyError, TypeError):
        return ""


def _human(pair: dict[str, Any]) -> int | None:
    choice = pair.get("human")
    return choice if type(choice) is int and choice in (1, 2) else None


def _labeled(row: dict[str, Any], pair: dict[str, Any]) -> LabeledPair:
    rationales = []
    for key, swapped in (("rationale_12", False), ("rationale_21", True)):
        found = row.get(key)
        # With self-consistency the judge has written several.
        texts = found if isinstance(found, list) else [found]
        rationales += [Rationale(swapped, turn("", text)) for text in texts[:_MAX_RATIONALES] if text]
    return LabeledPair(
        category=label(pair.get("category")),
        prompt=turns(pair.get("prompt")),
        responses=(turn("", pair.get("response_1")), turn("", pair.get("response_2"))),
        p=row["p"],
        p_12=probability(row.get("p_12")),
        p_21=probability(row.get("p_21")),
        human=_human(pair),
        rationales=rationales,
        criteria=by_criterion(row),
        votes=row.get("votes") or [],
    )
