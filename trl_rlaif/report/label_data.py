"""Reads labels.jsonl and its pairs: finds the run's own labels and aggregates them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_rlaif.report.criteria import ByCriterion, CriterionTotal, by_criterion, totals
from trl_rlaif.report.formatting import label, section
from trl_rlaif.report.jury import Verdict
from trl_rlaif.report.parsing import Turn, probability, spread, stored_lines, turn, turns

# Each has up to six rationales, so more pairs would make the page large.
MAX_LABELED = 30
_MAX_RATIONALES = 3


@dataclass(frozen=True)
class Rationale:
    """The text that a judge wrote before its answer; ``swapped`` if it was shown response 2 first."""

    swapped: bool
    turn: Turn


@dataclass(frozen=True)
class LabeledPair:
    """A pair with its label; probabilities are that response 1 is preferred, None if unknown."""

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
    """Aggregated labels: confidences in 0.5..1, and counts of winners, keyed (in order 1-2, in order 2-1).

    ``answers`` holds (p, human choice) for pairs where a person chose 1 or 2; ``pairs`` some labeled pairs, evenly
    spaced, or a jury's most disputed ones. ``criteria`` are those of criteria-based labels, over all pairs. ``second``
    counts the labels that prefer response 2.
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
    pairs: Sequence[dict[str, Any]],
    notes: list[str],
    ranked: dict[str, float],
    jury: dict[str, Verdict],
) -> Labels:
    """The run's own labels, one per pair; the file may also hold those of other labelers, and of removed pairs.

    Args:
        ranked: Probabilities from a ranking, by pair id.
        jury: Verdicts of a jury, by pair id.
    """
    labels = Labels()
    found = _of_jury(jury, pairs) if jury else _own(path, results, pairs, notes, ranked)
    shown: list[tuple[float, int]] = []  # (disagreement of a jury's members, number)
    labels.criteria = totals(_counted(labels, found, shown))
    if jury:
        shown.sort(key=lambda one: -one[0])
    chosen = shown[:MAX_LABELED] if jury else spread(shown, MAX_LABELED)
    labels.pairs = [_labeled(*one) for _, number in chosen if (one := found.get(number)) is not None]
    return labels


def _counted(
    labels: Labels, found: _Found, shown: list[tuple[float, int]]
) -> Iterator[tuple[float, list[ByCriterion]]]:
    """Add the labels to the counts and to ``shown`` if their pair is known; yield each label's p and criteria."""
    for number in range(found.count):
        one = found.get(number)
        if one is None:
            continue
        row, pair = one
        labels.total += 1
        p, p_12, p_21 = (probability(row.get(key)) for key in ("p", "p_12", "p_21"))
        if p is not None:
            labels.confidences.append(max(p, 1 - p))
            labels.second += p < 0.5
            if pair:
                shown.append((row.get("disagreement") or 0.0, number))
            if _human(pair):
                labels.answers.append((p, pair["human"]))
            yield row["p"], by_criterion(row)
        if p_12 is None or p_21 is None:
            continue
        if p_12 == 0.5 or p_21 == 0.5:
            labels.ties += 1
        else:
            labels.winners[(1 if p_12 > 0.5 else 2, 1 if p_21 > 0.5 else 2)] += 1


@dataclass(frozen=True)
class _Found:
    """Labels with their pairs, read on demand.

    Args:
        count: Upper bound on the number of labels.
        get: Label by number, with its pair ({} if unknown); None if there is no such label.
    """

    count: int
    get: Callable[[int], tuple[dict[str, Any], dict[str, Any]] | None]


def _of_jury(jury: dict[str, Verdict], pairs: Sequence[dict[str, Any]]) -> _Found:
    """A jury's label of each pair. Orders and rationales are known only for its members."""

    def get(number: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        verdict = jury.get(str(pairs[number].get("id")))
        return None if verdict is None else (vars(verdict), pairs[number])

    return _Found(len(pairs), get)


def _own(
    path: Path,
    results: dict[str, Any],
    pairs: Sequence[dict[str, Any]],
    notes: list[str],
    ranked: dict[str, float],
) -> _Found:
    setup, columns = (section(results, "label").get(key) for key in ("setup", "columns"))
    rows = stored_lines(path, notes)
    if setup is None:
        return _by_id(rows, pairs)
    latest = {str(row.get("pair")): place for place, row in enumerate(rows) if row.get("setup") == setup}

    def label_of(pair: dict[str, Any]) -> dict[str, Any] | None:
        # Labels are matched to pairs by their texts: the stored id may be that of an earlier pair with the same texts.
        place = latest.get(_key(pair, columns or ()))
        return None if place is None else rows[place]

    def get(number: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        pair = pairs[number]
        row = _joined(pair, label_of, ranked.get(str(pair.get("id")))) if ranked else label_of(pair)
        return None if row is None or (ranked and row["p"] is None) else (row, pair)

    return _Found(len(pairs), get)


def _by_id(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> _Found:
    """Labels matched by id, for a stage that has not finished: its key is not known yet."""
    of_pairs = {str(pair.get("id")): place for place, pair in enumerate(pairs)}
    latest = list({str(row.get("id")): place for place, row in enumerate(rows)}.items())

    def get(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        id, place = latest[number]
        return rows[place], pairs[of_pairs[id]] if id in of_pairs else {}

    return _Found(len(latest), get)


def _joined(
    pair: dict[str, Any], label_of: Callable[[dict[str, Any]], dict[str, Any] | None], p: float | None
) -> dict[str, Any]:
    """A ranked pair's label. A tournament judges each order separately: the other is stored for the swapped pair."""
    row = (label_of(pair) or {}) | {"p": p}
    turned = pair | {"response_1": pair.get("response_2"), "response_2": pair.get("response_1")}
    other = label_of(turned) or {}
    p_21 = probability(other.get("p_12"))
    if row.get("p_21") is None and p_21 is not None:
        row |= {"p_21": 1 - p_21, "rationale_21": other.get("rationale_12")}
    return row


def _key(pair: dict[str, Any], columns: Collection[str]) -> str:
    """A pair's key in labels.jsonl; an empty string if the line is not a pair."""
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
        # With self-consistency, the judge wrote several.
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
