"""A run's pairs of responses, and the blinded order in which a rater sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_rlaif.data import Message, Pair
from trl_rlaif.encoding import as_messages
from trl_rlaif.errors import UserError
from trl_rlaif.files import read_lines
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline import artifacts

# The subject of a vote: the set, the prompt's id in it, and a digest of the texts shown.
Name = tuple[str, str, str]


@dataclass(frozen=True)
class Comparison:
    """A held-out prompt with the responses of the initial and the trained policy.

    Args:
        name: Set, id, and digest of the three texts: votes on outdated texts do not count.
        category: The kind of prompt, or None.
        messages: The prompt's turns, at least one.
        start, trained: The responses; either may be empty.
        p_trained: The judge's probability in [0, 1] that ``trained`` is better; None if it was not judged.
    """

    name: Name
    category: str | None
    messages: list[Message]
    start: str
    trained: str
    p_trained: float | None

    @property
    def set(self) -> str:
        """The evaluated set that the prompt belongs to."""
        return self.name[0]

    @property
    def is_equal(self) -> bool:
        """Whether both responses are identical, so that there is nothing to rate."""
        return self.start == self.trained


def read_comparisons(run: str | Path) -> list[Comparison]:
    """The pairs in a run's ``samples.jsonl``, in its order; at least one.

    Raises:
        UserError: This is not a run's folder, its evaluation left no samples, or a sample lacks a required field.
        RunError: A line of the file is not JSON.
    """
    run = Path(run)
    if not (run / artifacts.RECIPE).is_file():
        raise UserError(
            "This is not a run's folder: it has no recipe.yaml.",
            where=str(run),
            fix="Name the folder that `trl-rlaif run` wrote.",
        )
    path = run / artifacts.SAMPLES
    if not path.is_file():
        raise UserError(
            "This run has no samples.jsonl, so there are no responses to compare.",
            where=str(run),
            fix="The stage `evaluate` writes it: finish the run with --resume, from a recipe with that section.",
        )
    found = [_comparison(row, f"{path}:{number}") for number, row in enumerate(read_lines(path), 1)]
    if not found:
        raise UserError("The file holds no responses to compare.", where=str(path), fix="Run `evaluate` again.")
    return list({comparison.name: comparison for comparison in found}.values())


def _comparison(row: Any, where: str) -> Comparison:
    try:
        messages = [{"role": str(m["role"]), "content": m["content"]} for m in as_messages(row["prompt"])]
        start, trained, p = row["start"], row["trained"], row.get("p_trained")
        texts = [start, trained, *(message["content"] for message in messages)]
        if not messages or not all(isinstance(text, str) for text in texts):
            raise TypeError
        name = (str(row["set"]), str(row["id"]), pair_key(Pair("", messages, start, trained)))
        category = row.get("category")
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            "This is not a sample: set, id, prompt, start and trained are needed, the last three as text.",
            where=where,
            fix="Run `evaluate` again.",
        ) from None
    judged = isinstance(p, (int, float)) and 0 <= p <= 1
    return Comparison(name, category and str(category), messages, start, trained, float(p) if judged else None)


def of_set(comparisons: Iterable[Comparison], name: str | None) -> list[Comparison]:
    """The comparisons of one set, or all if ``name`` is None.

    Raises:
        UserError: There is no such set.
    """
    comparisons = list(comparisons)
    sets = dict.fromkeys(comparison.set for comparison in comparisons)
    if name is not None and name not in sets:
        raise UserError(f"The run has no set '{name}'.", where="--set", fix=f"There are: {', '.join(sets)}.")
    return [comparison for comparison in comparisons if name in (None, comparison.set)]


# ---- Blindness --------------------------------------------------------------------------------------------


def blind_order(comparisons: Iterable[Comparison], rater: str, seed: int = 0) -> list[Comparison]:
    """The comparisons in the rater's own shuffled order; a subset keeps the order it has in the whole."""
    return sorted(comparisons, key=lambda comparison: _draw("order", seed, rater, comparison))


def trained_is_left(comparison: Comparison, rater: str, seed: int = 0) -> bool:
    """Whether a rater sees the trained policy's response on the left: a fair coin, the same at every start."""
    return _draw("side", seed, rater, comparison) % 2 == 1


def _draw(purpose: str, seed: int, rater: str, comparison: Comparison) -> int:
    # A digest, not a generator: a pair's draw must not depend on the other pairs.
    parts = json.dumps([purpose, seed, rater, *comparison.name])
    return int.from_bytes(hashlib.sha256(parts.encode()).digest(), "big")
