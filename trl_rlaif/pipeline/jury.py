"""Combines the labels of several labelers, and reports each member's learned reliability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif.errors import UserError
from trl_rlaif.files import to_line, write_atomically
from trl_rlaif.labels.jury import JOINS, Join, disagreement
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.label_rows import TaskLabels
from trl_rlaif.pipeline.rows import JuryRow, LabelRow
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe.sections import JurySection


class Jury:
    """The main labeler and those of ``label.compare``; reliabilities are learned from their votes on a run's pairs.

    Args:
        section: How votes are combined.
        members: Labels of all pairs by member name, the main labeler first.

    Attributes:
        labels: The combined labels, one per pair.
        disagreement: Standard deviation of each pair's votes; None where fewer than two members voted.
    """

    def __init__(self, section: JurySection, members: Mapping[str, TaskLabels]) -> None:
        self.section, self.members = section, list(members)
        self._votes = _votes(members)
        self._join: Join = JOINS[section.join].fit(self._votes)
        self.labels = self.joined(members)
        spread = disagreement(self._votes).tolist()
        self.disagreement = [None if math.isnan(value) else value for value in spread]
        for name, reliability in zip(self.members, self._join.reliability, strict=True):
            if reliability <= self._join.chance:
                effect = "are not counted" if section.join == "log_odds" else "count against what they say"
                say(
                    f"Warning ({name}): this member of the jury agrees with the others no more than by chance. Its "
                    f"votes {effect}: try another prompt, or a larger judge."
                )

    def joined(self, members: Mapping[str, TaskLabels]) -> JoinedRows:
        """The members' labels of any pairs, combined with the reliabilities learned from the run's own pairs."""
        votes = _votes(members)
        p = np.where(np.isnan(votes).all(axis=1), math.nan, self._join.join(votes))
        return JoinedRows(p, next(iter(members.values())))

    def undisputed(self, kept: np.ndarray) -> np.ndarray:
        """The indices among ``kept`` of pairs whose disagreement is at most ``max_disagreement``; all if it is not set.

        Raises:
            UserError: No pair is left.
        """
        most = self.section.max_disagreement
        if most is None:
            return kept
        agreed = kept[[(value := self.disagreement[place]) is not None and value <= most for place in kept.tolist()]]
        if not len(agreed):
            raise UserError(f"No pair's votes differ by {most} or less.", fix="Raise label.jury.max_disagreement.")
        return agreed

    def numbers(self, disputed: int) -> dict[str, Any]:
        """The members' reliabilities and agreement.

        Args:
            disputed: Number of pairs left out because of disagreement.
        """
        p = self.labels.p
        sides, known = np.sign(self._votes - 0.5) == np.sign(p - 0.5)[:, None], ~np.isnan(self._votes)
        spread = [value for value in self.disagreement if value is not None]
        return {
            "join": self.section.join,
            "disagreement": sum(spread) / len(spread) if spread else None,
            "disputed": disputed,
            "members": {
                name: {
                    "votes": int(known[:, j].sum()),
                    "reliability": float(self._join.reliability[j]),
                    "with_jury": float(sides[known[:, j], j].mean()) if known[:, j].any() else None,
                }
                for j, name in enumerate(self.members)
            },
        }

    def write(self, context: Context) -> None:
        """Write ``jury.jsonl``."""
        votes = np.where(np.isnan(self._votes), None, self._votes)
        rows: Iterator[JuryRow] = (
            {
                "id": label["id"],
                "p": label["p"],
                "disagreement": spread,
                "votes": dict(zip(self.members, of.tolist(), strict=True)),
            }
            for label, spread, of in zip(self.labels, self.disagreement, votes, strict=True)
        )
        write_atomically(context.folder / artifacts.JURY, map(to_line, rows))


class JoinedRows(Sequence[LabelRow]):
    """A jury's labels of N pairs. A pair that no member could judge is skipped, with the main labeler's reason.

    Args:
        p: The combined probabilities, (N,) float64; NaN if no member voted.
        main: The main labeler's labels.
    """

    def __init__(self, p: np.ndarray, main: TaskLabels) -> None:
        self.p, self._main = p, main

    def __len__(self) -> int:
        return len(self.p)

    def __getitem__(self, index: Any) -> Any:
        p = float(self.p[index])
        # Each member has its own masses and probabilities by order.
        row: Any = {"id": self._main.pairs[index].id, "p": p}
        row |= dict.fromkeys(("p_12", "p_21", "mass_12", "mass_21"))
        if math.isnan(p):
            row |= {"p": None, "skipped": (self._main.rows[index] or {}).get("skipped", "no vote")}
        return row


def _votes(members: Mapping[str, TaskLabels]) -> np.ndarray:
    """(N, J) probabilities that response_1 is preferred; NaN is a missing vote."""
    return np.column_stack([of.columns.p for of in members.values()])
