"""The labels of several labelers, joined into one: what becomes of a pair, and what was learned of each member."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif.data import Pair
from trl_rlaif.errors import UserError
from trl_rlaif.files import to_line, write_atomically
from trl_rlaif.labels.jury import JOINS, Join, disagreement
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.rows import JuryRow, LabelRow
from trl_rlaif.progress import say

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.recipe.sections import JurySection

ByMember = Mapping[str, Mapping[str, LabelRow]]
"""Labels by pair id, by the member's name."""


class Jury:
    """The main labeler and those of ``label.compare``, whose votes on a run's pairs say how reliable each is.

    Args:
        section: How they are joined.
        pairs: The run's.
        rows: Their labels; a member may lack some.

    Attributes:
        labels: One for each pair.
        disagreement: Standard deviation of each pair's votes; None where fewer than two members voted.
    """

    def __init__(self, section: JurySection, pairs: Sequence[Pair], rows: ByMember) -> None:
        self.section, self.members, self._ids = section, list(rows), [pair.id for pair in pairs]
        self._votes = _votes(rows, self._ids)
        self._join: Join = JOINS[section.join].fit(self._votes)
        self.labels = self.joined(rows, self._ids)
        spread = disagreement(self._votes).tolist()
        self.disagreement = [None if math.isnan(value) else value for value in spread]
        for name, reliability in zip(self.members, self._join.reliability, strict=True):
            if reliability <= self._join.chance:
                effect = "are not counted" if section.join == "log_odds" else "count against what they say"
                say(
                    f"Warning ({name}): this member of the jury agrees with the others no more than by chance. Its "
                    f"votes {effect}: try another prompt, or a larger judge."
                )

    def joined(self, rows: ByMember, ids: list[str]) -> list[LabelRow]:
        """What the members' labels of these pairs become, by the reliability learned of the run's own.

        A pair that no member could judge is skipped, for the first member's reason.
        """
        votes, main = _votes(rows, ids), next(iter(rows.values()))
        found: list[LabelRow] = []
        for id, p, known in zip(ids, self._join.join(votes).tolist(), ~np.isnan(votes), strict=True):
            # Of both orders and of masses each member has its own.
            row: Any = {"id": id, "p": p, "p_12": None, "p_21": None, "mass_12": None, "mass_21": None}
            found.append(row if known.any() else row | {"p": None, "skipped": main[id].get("skipped", "no vote")})
        return found

    def undisputed(self, kept: np.ndarray) -> np.ndarray:
        """Those of these pairs, by their places, about which the members agree well enough.

        Raises:
            UserError: There are none.
        """
        most = self.section.max_disagreement
        if most is None:
            return kept
        agreed = kept[[(value := self.disagreement[place]) is not None and value <= most for place in kept.tolist()]]
        if not len(agreed):
            raise UserError(f"No pair's votes differ by {most} or less.", fix="Raise label.jury.max_disagreement.")
        return agreed

    def numbers(self, disputed: int) -> dict[str, Any]:
        """What was learned of the members, and how far they agree.

        Args:
            disputed: Pairs left out, since the members disagree on them.
        """
        p = np.array([math.nan if row["p"] is None else row["p"] for row in self.labels])
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
        votes = np.where(np.isnan(self._votes), None, self._votes).tolist()
        rows: list[JuryRow] = [
            {
                "id": id,
                "p": label["p"],
                "disagreement": spread,
                "votes": dict(zip(self.members, of, strict=True)),
            }
            for id, label, spread, of in zip(self._ids, self.labels, self.disagreement, votes, strict=True)
        ]
        write_atomically(context.folder / artifacts.JURY, "".join(map(to_line, rows)))


def _votes(rows: ByMember, ids: list[str]) -> np.ndarray:
    """(N, J) probabilities that response_1 is preferred, NaN where a member has none."""
    found = [[of[id]["p"] if id in of else None for of in rows.values()] for id in ids]
    return np.array(found, dtype=np.float64)
