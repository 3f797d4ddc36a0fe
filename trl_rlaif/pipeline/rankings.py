"""Ranks each prompt's responses: which comparisons to label, and the resulting probabilities of the prompt's pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm

from trl_rlaif.data import Pair
from trl_rlaif.encoding import as_messages
from trl_rlaif.errors import UserError
from trl_rlaif.files import to_json, to_line, write_atomically
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.rows import LabelRow, RankingRow
from trl_rlaif.ranking.bradley_terry import Comparisons, Strengths, fit
from trl_rlaif.ranking.tournament import Asked, rank_by_tournament

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe.sections import RankingSection

Label = Callable[[list[Pair]], dict[str, LabelRow]]
"""Labels pairs, each asked only in its own order; returns the labels by pair id."""

_CONFIDENCE = 0.95
_QUANTILE = float(norm.ppf((1 + _CONFIDENCE) / 2))


def of(context: Context, pairs: Sequence[Pair], columns: Collection[str]) -> Rankings | None:
    """The pairs, to be ranked by the recipe's settings; None if it ranks none.

    Args:
        columns: Data columns that labels depend on.

    Raises:
        UserError: A tournament is run with --shard.
    """
    section = context.recipe.label.ranking
    if section is not None and section.method == "tournament" and context.shard:
        raise UserError(
            "A tournament cannot be divided with --shard: what it asks next follows from all answers.",
            where=context.recipe.line(("label", "ranking")),
            fix="Set method: all_pairs, or run without --shard.",
        )
    return None if section is None else Rankings(section, pairs, columns)


@dataclass
class _Group:
    """A prompt's distinct responses, and its pairs by response numbers."""

    responses: dict[str, int] = field(default_factory=dict)
    pairs: dict[tuple[int, int], Pair] = field(default_factory=dict)

    def add(self, pair: Pair) -> tuple[int, int]:
        """Add a pair, and return the numbers of its responses."""
        first, second = (
            self.responses.setdefault(text, len(self.responses)) for text in (pair.response_1, pair.response_2)
        )
        self.pairs.setdefault((first, second), pair)
        return first, second

    def pair(self, first: int, second: int) -> Pair:
        """The pair of two responses in this order: from the data, a swapped one, or one not in the data."""
        if (first, second) in self.pairs:
            return self.pairs[first, second]
        texts, any_pair = list(self.responses), next(iter(self.pairs.values()))
        id = f"{self.pairs.get((second, first), any_pair).id} turned to {first + 1}-{second + 1}"
        return replace(any_pair, id=id, response_1=texts[first], response_2=texts[second], human=None)


class Rankings:
    """All pairs of a run, grouped by prompt.

    Args:
        section: The ranking settings.
        pairs: Any number per prompt; a prompt's responses are those in its pairs.
        columns: Data columns that labels depend on: prompts that differ in them are different prompts.
    """

    def __init__(self, section: RankingSection, pairs: Sequence[Pair], columns: Collection[str] = ()) -> None:
        self.section, self.pairs = section, pairs
        self.groups: list[_Group] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        by_prompt: dict[str, int] = {}
        for pair in pairs:
            row = {name: pair.extra.get(name) for name in columns}
            number = by_prompt.setdefault(to_json([as_messages(pair.prompt), row]), len(by_prompt))
            self.groups += [_Group()] if number == len(self.groups) else []
            self._places[pair.id] = (number, *self.groups[number].add(pair))
        self.sizes = [len(group.responses) for group in self.groups]
        self._asked: list[tuple[Asked, float, float]] = []  # with the answer, and 1 if its order counts, else 0
        self.strengths: Strengths | None = None

    def play(self, label: Label) -> dict[str, LabelRow]:
        """Run a tournament. Its answers are labels of pairs in one order, merged into the rows of the run's pairs."""
        told: dict[Asked, LabelRow] = {}

        def ask(questions: list[Asked]) -> list[float | None]:
            pairs = [self.groups[q.group].pair(q.first, q.second) for q in questions]
            rows = label(pairs)
            told.update((q, rows[pair.id]) for q, pair in zip(questions, pairs, strict=True))
            return [told[question]["p"] for question in questions]

        section = self.section
        found = rank_by_tournament(
            ask, self.sizes, questions=section.questions, at_once=section.at_once, confidence=section.confidence
        )
        self.strengths = found.strengths
        answers = zip(found.asked, found.answers, strict=True)
        self._asked = [(question, p, 1.0) for question, p in answers if p is not None]
        return {id: self._joined(id, told) for id in self._places}

    def _joined(self, id: str, told: dict[Asked, LabelRow]) -> LabelRow:
        """The judge's answers for a pair, in the orders asked. ``take`` adds the probability."""
        group, first, second = self._places[id]
        row: Any = {"id": id, "p": None, "p_12": None, "p_21": None, "mass_12": None, "mass_21": None, "judge": ""}
        for order, other in ((first, second), "12"), ((second, first), "21"):
            found = told.get(Asked(group, *order))
            if found is None:
                continue
            of_order = {f"{key}_{other}": found.get(f"{key}_12") for key in ("mass", "rationale", "bound")}
            row |= {key: value for key, value in of_order.items() if value is not None}
            row |= {key: found[key] for key in ("judge", "voted", "skipped") if key in found}
            p = found["p"]
            row[f"p_{other}"] = p if p is None or other == "12" else 1 - p
        return row

    def take(self, rows: dict[str, LabelRow]) -> dict[str, LabelRow]:
        """The same rows with probabilities from the ranking.

        The strengths are fitted to the rows, unless a tournament fitted them to its answers. A pair has a probability
        if both its responses were compared with any response.
        """
        if self.strengths is None:
            # A pair that is repeated in the data, or swapped, is one question per order.
            once = {(group, *sorted(items)): id for id, (group, *items) in self._places.items()}
            self._asked = [answer for id in once.values() for answer in self._answers(id, rows[id])]
            self.strengths = fit(self._comparisons(), self.sizes)
        compared = {(q.group, item) for q, _, _ in self._asked for item in (q.first, q.second)}
        found = {}
        for id, p in self._probabilities().items():
            group, first, second = self._places[id]
            known = {(group, first), (group, second)} <= compared
            row: Any = {key: value for key, value in rows[id].items() if key != "skipped"}
            reason = rows[id].get("skipped", "neither asked nor implied")
            found[id] = row | ({"p": p} if known else {"p": None, "skipped": reason})
        return found

    def _probabilities(self) -> dict[str, float]:
        """Probability that response_1 is better, by pair id."""
        group, first, second = np.array(list(self._places.values()), dtype=np.int64).T
        return dict(zip(self._places, self.strengths.probabilities(group, first, second).tolist(), strict=True))

    def _answers(self, id: str, row: LabelRow) -> list[tuple[Asked, float, float]]:
        """A label as comparisons: one per order asked, or a single one without order effects; empty without ``p``."""
        group, first, second = self._places[id]
        there, back = Asked(group, first, second), Asked(group, second, first)
        p, p_12, p_21 = row["p"], row.get("p_12"), row.get("p_21")
        found = [] if p_12 is None else [(there, p_12, 1.0)]
        found += [] if p_21 is None else [(back, 1 - p_21, 1.0)]
        return [] if p is None else found or [(there, p, 0.0)]

    def _comparisons(self) -> Comparisons:
        columns = [(q.group, q.first, q.second, p, position) for q, p, position in self._asked]
        group, first, second, p, position = np.array(columns, dtype=np.float64).reshape(-1, 5).T
        items = {"group": group, "first": first, "second": second}
        return Comparisons(**{k: v.astype(np.int64) for k, v in items.items()}, p=p, position=position)

    # ---- Output ---------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Number of questions, effect of the first position, and certainty of the order."""
        found, error = self.strengths, self.strengths.position_error
        difference, errors = found.differences(*self._every_pair())
        wrong = norm.cdf(-np.abs(difference) / np.maximum(errors, 1e-12))
        ordered = any(position for _, _, position in self._asked)
        return {
            "method": self.section.method,
            "prompts": len(self.groups),
            "responses": sum(self.sizes),
            "questions": len(self._asked),
            "all_questions": sum(size * (size - 1) for size in self.sizes),
            "position": found.position if ordered else None,
            "position_interval": [found.position + sign * _QUANTILE * error for sign in (-1, 1)] if ordered else None,
            "dispersion": found.dispersion,
            "wrong": float(wrong.mean()),
            "certain": float((wrong <= 1 - _CONFIDENCE).mean()),
        }

    def _every_pair(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Group and items of every possible pair within the groups, in the data or not."""
        found = [(g, i, j) for g, size in enumerate(self.sizes) for j in range(size) for i in range(j)]
        group, first, second = np.array(found, dtype=np.int64).T
        return group, first, second

    def write(self, context: Context) -> None:
        """Write ``rankings.jsonl``."""
        answers: list[list[Any]] = [[] for _ in self.groups]
        for question, p, _ in self._asked:
            answers[question.group].append((question.first, question.second, p))
        pairs: list[dict[str, float]] = [{} for _ in self.groups]
        for id, p in self._probabilities().items():
            pairs[self._places[id][0]][id] = p
        lines = (to_line(self._row(g, answers[g], pairs[g])) for g in range(len(self.groups)))
        write_atomically(context.folder / artifacts.RANKINGS, "".join(lines))

    def _row(self, number: int, answers: list[Any], pairs: dict[str, float]) -> RankingRow:
        group, any_pair = self.groups[number], next(iter(self.groups[number].pairs.values()))
        values, errors = self.strengths.values[number].tolist(), self.strengths.errors()[number].tolist()
        order = sorted(range(self.sizes[number]), key=lambda item: -values[item])
        rank = {item: place for place, item in enumerate(order)}
        texts = list(group.responses)
        return {
            "prompt": any_pair.prompt,
            "category": any_pair.category,
            "responses": [texts[i] for i in order],
            "strengths": [values[i] for i in order],
            "intervals": [(values[i] - _QUANTILE * errors[i], values[i] + _QUANTILE * errors[i]) for i in order],
            "pairs": pairs,
            "answers": [(rank[first], rank[second], p) for first, second, p in answers],
        }
