"""A labeler's labels of a run's pairs, and statistics of them. Only numbers and categories stay in memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trl_rlaif.data import Pair
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.evaluation import agreement, calibration_error, length_preference, position_bias, summarize_mass
from trl_rlaif.judging.suspicious import count_suspicious
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.pipeline.results import LabelResults
from trl_rlaif.pipeline.rows import JudgedRow, LabelRow

# With less probability mass than this on its candidates, a judge did not answer the question.
LOW_MASS = 0.5


class StoredRows(Sequence[LabelRow | None]):
    """Labels of N pairs, each read from disk on access.

    Args:
        store: Contains them.
        setup: ``LabelKey.key`` of the labels.
        keys: The pairs' keys, (N,) of dtype ``KEY``.
    """

    def __init__(self, store: LabelStore, setup: str, keys: np.ndarray) -> None:
        self._store, self._setup, self._keys = store, setup, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        return self._store.get(self._setup, self._keys[index].decode())


@dataclass
class Columns:
    """Columns of N pairs and their labels; NaN if a pair lacks the number.

    Args:
        p, p_12, p_21: As in Label, float64.
        human, categories: As in Pair.
        prompts: ``prompt_key`` of each prompt as a number.
        lengths: Characters of response_1 and response_2 of each pair in turn, 2N entries.
        masses: Candidate masses of all answers for labeled pairs, in the order of the pairs.
        skipped: Pairs that could not be judged, by reason.
        counts: Numbers of labels that are ``voted`` and ``bounded``.
        suspicious: Labeled pairs with responses aimed at the judge, from ``count_suspicious``.
    """

    p: array[float] = field(default_factory=lambda: array("d"))
    p_12: array[float] = field(default_factory=lambda: array("d"))
    p_21: array[float] = field(default_factory=lambda: array("d"))
    human: list[int | None] = field(default_factory=list)
    categories: list[str | None] = field(default_factory=list)
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("L"))
    masses: array[float] = field(default_factory=lambda: array("d"))
    skipped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    suspicious: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Sequence[Pair], rows: Sequence[LabelRow | None]) -> Columns:
        """Read every pair and its label once."""
        found = cls()
        found.suspicious = count_suspicious(pair.responses for pair in found._labeled(pairs, rows))
        return found

    def _labeled(self, pairs: Sequence[Pair], rows: Sequence[LabelRow | None]) -> Iterator[Pair]:
        """Adds every pair to the columns; yields those with a probability."""
        names: dict[str | None, str | None] = {}
        for pair, known in zip(pairs, rows, strict=True):
            row: Any = known or {}
            for name, numbers in (("p", self.p), ("p_12", self.p_12), ("p_21", self.p_21)):
                numbers.append(np.nan if row.get(name) is None else row[name])
            self.human.append(pair.human)
            self.categories.append(names.setdefault(pair.category, pair.category))
            self.prompts.append(int(prompt_key(pair.prompt), 16))
            self.lengths.extend(map(len, pair.responses))
            self.skipped.update([row["skipped"]] if row.get("skipped") else [])
            if row.get("p") is not None:
                self.masses.extend(mass for mass in (row["mass_12"], row["mass_21"]) if mass is not None)
                self.counts["voted"] += bool(row.get("voted"))
                self.counts["bounded"] += "bound_12" in row or "bound_21" in row
                yield pair

    @cached_property
    def labeled(self) -> np.ndarray:
        """Indices of the pairs with a probability, int64."""
        return np.flatnonzero(~np.isnan(self.p))


class TaskLabels:
    """A task's labels, and the cost of making the missing ones.

    Args:
        key: The labels' key.
        pairs: N pairs.
        rows: N labels; None if missing.
        asked: Indices of the pairs without a label when the pass began.
        noted: The pass's notes, such as ``seconds``.
    """

    def __init__(
        self,
        key: LabelKey,
        pairs: Sequence[Pair],
        rows: Sequence[LabelRow | None],
        asked: np.ndarray,
        noted: dict[str, Any],
    ) -> None:
        self.key, self.pairs, self.rows, self.asked, self.noted = key, pairs, rows, asked, noted

    @cached_property
    def columns(self) -> Columns:
        """The pairs and labels as columns, read on first use."""
        return Columns.of(self.pairs, self.rows)

    def by_id(self) -> dict[str, LabelRow]:
        """All labels, loaded into memory, by pair id."""
        return {pair.id: row for pair, row in zip(self.pairs, self.rows, strict=True) if row is not None}

    def judged(self) -> dict[str, JudgedRow]:
        """The same, without pairs that could not be judged."""
        return {id: row for id, row in self.by_id().items() if row["p"] is not None}

    def position_bias(self) -> dict[str, Any] | None:
        """Position bias on the pairs judged in both orders; None if there are none."""
        columns = self.columns
        p_12, p_21 = (np.array(numbers)[columns.labeled] for numbers in (columns.p_12, columns.p_21))
        both = ~np.isnan(p_12 + p_21)
        if not both.any():
            return None
        prompts = np.array(columns.prompts)[columns.labeled]
        return position_bias(*(numbers[both].tolist() for numbers in (p_12, p_21, prompts)))

    def low_masses(self) -> int:
        """Number of answers whose total candidate mass is below ``LOW_MASS``."""
        return sum(mass < LOW_MASS for mass in self.columns.masses)

    def numbers(self) -> LabelResults:
        """The labeler's results."""
        columns, noted = self.columns, self.noted
        known = columns.labeled.tolist()
        p, human = [columns.p[i] for i in known], [columns.human[i] for i in known]
        prompts, lengths = [columns.prompts[i] for i in known], np.array(columns.lengths).reshape(-1, 2)
        made = int(np.isin(self.asked, columns.labeled).sum())
        return {
            "pairs": len(self.pairs),
            "labeled": len(known),
            "skipped": dict(columns.skipped),
            "mean_confidence": sum(max(x, 1 - x) for x in p) / len(p) if p else None,
            "position_bias": self.position_bias(),
            "mass": summarize_mass(columns.masses, LOW_MASS),
            "agreement": agreement(p, human, prompts),
            "agreement_by_category": self._agreement_by_category(),
            "length_preference": length_preference(p, human, lengths[known].tolist(), prompts),
            "ece": calibration_error(p, human),
            "judge": self.key.judge,
            "labeler": self.key.labeler,
            "setup": self.key.key,
            "columns": list(self.key.columns),
            "made": made,
            "voted": columns.counts["voted"],
            "suspicious": columns.suspicious,
            "bounded": columns.counts["bounded"],
            "pairs_per_second": made / noted["seconds"] if made and noted.get("seconds") else None,
            "precision": noted.get("precision"),
        }

    def _agreement_by_category(self) -> dict[str, Any]:
        columns, by_category = self.columns, dict[str, list[int]]()
        for i in columns.labeled.tolist():
            category = columns.categories[i]
            if category is not None and columns.human[i] is not None:
                by_category.setdefault(category, []).append(i)
        return {
            name: agreement(*([column[i] for i in of] for column in (columns.p, columns.human, columns.prompts)))
            for name, of in by_category.items()
            if any(columns.human[i] != 0 for i in of)
        }
