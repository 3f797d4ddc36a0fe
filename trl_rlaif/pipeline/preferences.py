"""``preferences/``: training data of the reward model or DPO, from a judge's labels or human choices."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_rlaif.errors import UserError
from trl_rlaif.files import digest_of, to_json, write_folder
from trl_rlaif.pipeline import artifacts

if TYPE_CHECKING:
    from trl_rlaif.data import Pair
    from trl_rlaif.pipeline.context import Context

# A human choice as the probability that response_1 is preferred.
HUMAN_P = {1: 1.0, 2: 0.0}
# The reason for leaving out a pair if labels are hard.
TIE = "tie"
# Pairs held in memory at a time.
_AT_ONCE = 16_384


def preferences_of_people(context: Context, section: str) -> dict[str, int]:
    """Write ``preferences/`` from the data's human choices, for a recipe without a stage ``label``.

    These are hard labels: training treats every chosen response as certainly better. So ties are left out.

    Args:
        section: The section that trains on them, for the message.

    Returns:
        The number of pairs left out, by reason.

    Raises:
        UserError: No pair has a human choice for one of its responses.
    """
    pairs = context.pairs()
    human = [pair.human for pair in pairs]
    p = np.array([HUMAN_P.get(choice, math.nan) for choice in human])
    if np.isnan(p).all():
        raise UserError(
            "There is no stage label, and no pair says which response a person preferred.",
            where=context.recipe.line((section,)),
            fix="Add a label section, or pairs with human choices.",
        )
    write_preferences(context, pairs, p)
    left_out = {TIE: human.count(0), "no human choice": human.count(None)}
    return {reason: count for reason, count in left_out.items() if count}


def write_preferences(
    context: Context, pairs: Sequence[Pair], p: np.ndarray, disagreement: Sequence[float | None] | None = None
) -> None:
    """Write ``preferences/``: TRL's preference format, with ``p``, the probability of ``chosen``.

    If pairs with human choices have a margin, TRL's column ``margin`` is added. Rows are built 16,384 at a time.

    Args:
        p: Probability that response_1 is preferred, (N,) float64; pairs with NaN are left out.
        disagreement: A jury's for N pairs, written as a column of that name.
    """
    kept = np.flatnonzero(~np.isnan(p)).tolist()
    has_margin = any("margin" in pair.extra for pair in (pairs[i] for i in kept) if pair.human in HUMAN_P)

    def row(place: int) -> dict[str, Any]:
        pair, value = pairs[place], float(p[place])
        found = _preference(context, pair, value) | ({"margin": _margin(pair, value)} if has_margin else {})
        return found | ({"disagreement": disagreement[place]} if disagreement is not None else {})

    parts = [kept[start : start + _AT_ONCE] for start in range(0, len(kept), _AT_ONCE)]
    write_folder(context.folder / artifacts.PREFERENCES, lambda folder: _write_parts(folder, parts, row))


def _write_parts(folder: Path, parts: Sequence[Sequence[int]], row: Callable[[int], dict[str, Any]]) -> None:
    """Write a folder in the format of ``Dataset.save_to_disk``, which would need all rows at once."""
    import pyarrow
    from datasets import Dataset

    untyped = {"category": pyarrow.string(), "human": pyarrow.bool_(), "disagreement": pyarrow.float64()}
    paths = [folder / f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    schemas = []
    for path, part in zip(paths, parts, strict=True):
        table = pyarrow.Table.from_pylist([*map(row, part)])
        # A column of None has no inferred type.
        schemas.append(pyarrow.schema([(of.name, untyped.get(of.name, of.type)) for of in table.schema]))
        _write_table(path, table.cast(schemas[-1]))
    # Messages may have keys in one part that are missing in another.
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    for path, own in zip(paths, schemas, strict=True):
        if own != schema:
            with pyarrow.OSFile(str(path)) as file:
                table = pyarrow.ipc.open_stream(file).read_all()
            _write_table(path, table.cast(schema))
    digest = hashlib.sha256("".join(map(digest_of, paths)).encode()).hexdigest()
    Dataset(schema.empty_table(), fingerprint=digest[:16]).save_to_disk(str(folder))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": path.name} for path in paths]
    (folder / "state.json").write_text(to_json(state, indent=2), encoding="utf-8")


def _write_table(path: Path, table: Any) -> None:
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _preference(context: Context, pair: Pair, p: float) -> dict[str, Any]:
    first = p >= 0.5
    chosen, rejected = (pair.response_1, pair.response_2) if first else (pair.response_2, pair.response_1)
    prompt = context.chat(pair.prompt)
    if not isinstance(prompt, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {
        "id": pair.id,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "p": p if first else 1 - p,
        "category": pair.category,
        # Whether a human also preferred the chosen response; None for a tie or without a human choice.
        "human": (pair.human == 1) == first if pair.human in (1, 2) else None,
    }


def _margin(pair: Pair, p: float) -> float:
    """The human choice's margin if it is the chosen response; otherwise the margin is unknown, and 0."""
    agrees = pair.human in HUMAN_P and (pair.human == 1) == (p >= 0.5)
    return float(pair.extra.get("margin") or 0.0) if agrees else 0.0
