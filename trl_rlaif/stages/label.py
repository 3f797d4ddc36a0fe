"""Soft labels from the judge, and the preference dataset that follows from them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from trl_rlaif.artifacts import append_lines, read_lines, write_folder
from trl_rlaif.data import Pair
from trl_rlaif.errors import RunError
from trl_rlaif.measures import agreement, position_bias, summarize_mass
from trl_rlaif.progress import progress_bar
from trl_rlaif.stages.context import Context

# A judge with less than this on its candidates did not answer the question.
LOW_MASS = 0.5


def run(context: Context) -> dict[str, Any]:
    """Write ``labels.jsonl`` and ``preferences/``; return what the labels say of the labeler."""
    section, started = context.recipe.label, time.monotonic()
    pairs = context.pairs()
    path = context.folder / "labels.jsonl"
    rows = read_lines(path)
    done = {row["id"] for row in rows}
    if len(done) < len(pairs):
        judge = context.judge(section.judge, section.prompt, section.batch_tokens)
        with progress_bar("Labeling", len(pairs), len(done)) as advance:
            for label in context.labeler().label(pairs, judge, done):
                row = {k: v for k, v in asdict(label).items() if k != "skipped" or v is not None}
                append_lines(path, [row])
                rows.append(row)
                advance(1)
    labeled = {row["id"]: row for row in rows if row["p"] is not None}
    if not labeled:
        raise RunError("The judge could not label a single pair.", fix="See results.json for the reasons.")
    write_preferences(context, pairs, {id: row["p"] for id, row in labeled.items()})
    return _numbers(pairs, rows, labeled) | {"seconds": time.monotonic() - started}


def _numbers(pairs: list[Pair], rows: list[dict], labeled: dict[str, dict]) -> dict[str, Any]:
    known = [pair for pair in pairs if pair.id in labeled]
    p = [labeled[pair.id]["p"] for pair in known]
    both = [r for r in labeled.values() if r["p_12"] is not None and r["p_21"] is not None]
    masses = [r[k] for r in labeled.values() for k in ("mass_12", "mass_21") if r[k] is not None]
    return {
        "pairs": len(pairs),
        "labeled": len(labeled),
        "skipped": dict(Counter(row["skipped"] for row in rows if row.get("skipped"))),
        "mean_confidence": sum(max(x, 1 - x) for x in p) / len(p),
        "position_bias": position_bias([r["p_12"] for r in both], [r["p_21"] for r in both]),
        "mass": summarize_mass(masses, LOW_MASS),
        "agreement": agreement(p, [pair.human for pair in known]),
        "judge": rows[0]["judge"],
    }


def write_preferences(context: Context, pairs: list[Pair], p: dict[str, float]) -> None:
    """Write ``preferences/``: TRL's preference format, with ``p``, the probability of ``chosen``.

    Args:
        p: Probability that response_1 is preferred, by pair id; pairs that are not in it are left out.
    """
    from datasets import Dataset, Features, Value

    rows = [_preference(context, pair, p[pair.id]) for pair in pairs if pair.id in p]
    dataset = Dataset.from_list(rows)
    # A column of None has no type of its own.
    features = Features({**dataset.features, "category": Value("string"), "human": Value("bool")})
    dataset = dataset.cast(features)
    write_folder(context.folder / "preferences", lambda folder: dataset.save_to_disk(str(folder)))


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
        # Whether a person preferred the chosen one, too; None for a tie or where nobody was asked.
        "human": (pair.human == 1) == first if pair.human in (1, 2) else None,
    }
