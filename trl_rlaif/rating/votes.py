"""votes.jsonl: people's choices, appended as they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trl_rlaif.errors import RunError
from trl_rlaif.files import append_lines, read_lines
from trl_rlaif.locks import lock
from trl_rlaif.rating.pairs import Name

# By rater and pair, the choice that counts, in order of voting.
Standing = dict[str, dict[Name, float]]


@dataclass(frozen=True)
class Vote:
    """A line of votes.jsonl.

    Args:
        name: The comparison (``Comparison.name``).
        rater: The rater's name.
        choice: Probability that ``trained`` is better: 1, 0.5 for a tie, or 0; None takes the last vote back.
    """

    name: Name
    rater: str
    choice: float | None


class VoteFile:
    """The votes of a run. Lines are only ever appended; a rater's last line about a pair counts.

    Several processes may write concurrently: a file lock keeps their lines separate.

    Args:
        path: votes.jsonl; it is created with the first vote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def _locked(self, mode: str, *, shared: bool = False) -> Iterator[None]:
        with self.path.open(mode) as file:  # closing it unlocks it
            lock(file, shared=shared)
            yield

    def add(self, vote: Vote) -> None:
        """Append a vote; it is on disk when this returns.

        Raises:
            OSError: It could not be written, and does not count.
        """
        set_, id_, pair = vote.name
        row = {
            "id": id_,
            "set": set_,
            "pair": pair,
            "rater": vote.rater,
            "choice": vote.choice,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        with self._locked("ab"):
            read_lines(self.path)  # removes an incomplete last line, left by a kill or a full disk
            append_lines(self.path, [row])

    def standing(self) -> Standing:
        """The votes that count.

        Raises:
            RunError: A line is not a vote: the file was edited.
        """
        if not self.path.exists():
            return {}
        with self._locked("rb", shared=True):
            rows = read_lines(self.path)
        standing: Standing = {}
        for number, row in enumerate(rows, 1):
            try:
                name, rater, choice = (row["set"], row["id"], row["pair"]), row["rater"], row["choice"]
                if not all(isinstance(text, str) for text in (*name, rater)) or choice not in (0, 0.5, 1, None):
                    raise TypeError
            except (KeyError, TypeError):
                raise RunError(
                    "This is not a vote: set, id, pair and rater are texts, and choice is 0, 0.5, 1 or null.",
                    where=f"{self.path}:{number}",
                    fix="Fix the line or remove it.",
                ) from None
            votes = standing.setdefault(rater, {})
            votes.pop(name, None)  # a new vote on an old pair is the latest one
            if choice is not None:
                votes[name] = float(choice)
        return {rater: votes for rater, votes in standing.items() if votes}
