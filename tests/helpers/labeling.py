"""The label stage on a tiny model: its pairs, runs and outputs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from helpers.recipes import WORDS, tiny_recipe, write_prompt_folder, write_rows
from trl_rlaif.data import Pair
from trl_rlaif.labels import LabelStore
from trl_rlaif.labels.ray import Answered, Worker
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

LABEL_ALONE = {"sample": None, "reward": None, "rl": None, "evaluate": None, "report": None}


def make_pairs(count: int, start: int = 0, human: Sequence[int | None] = (1, 2, None)) -> list[dict[str, Any]]:
    """Pairs of responses; their human labels cycle through the three values of ``human``."""
    return [
        {
            "id": f"p{i}",
            "prompt": f"what is the {WORDS[i % 10]} {i}?",
            "response_1": f"a {WORDS[(i + 3) % 10]} " * (1 + i % 3),
            "response_2": f"the {WORDS[(i + 7) % 10]} of {i}",
            "category": ("a", "b")[i % 2],
            "human": human[i * 7 % 3],
        }
        for i in range(start, start + count)
    ]


def label_stage(model_path: str, base: Path) -> Callable[..., RunFolder]:
    """A function that runs the label stage over pairs, with given keys of its section, and returns the run folder."""
    write_prompt_folder(base / "prompt")

    def run(output="out", pairs=12, shard=None, report=None, model=None, **section):
        write_rows(base / "pairs.jsonl", make_pairs(pairs) if isinstance(pairs, int) else pairs)
        data = {"prompts": None, "pairs": "pairs.jsonl"}
        sections = {**LABEL_ALONE, "report": report, "model": model or {}, "data": data}
        keys = {"prompt": "prompt", "batch_tokens": 600, "precision": "highest", **section}
        recipe = tiny_recipe(base, model_path, **sections, label=keys)
        return run_recipe(recipe, installed_plugins(), base / output, resume=True, shard=shard)

    return run


def mapped_in_turn(
    pairs: Sequence[Pair],
    of_worker: tuple[Any, ...],
    *,
    workers: int,
    batch_size: int,
    num_cpus: float,
    num_gpus: float,
) -> Iterator[Answered]:
    """Ray's workers without Ray: in this process, taking turns, with inputs and outputs pickled. Batches come back in
    reverse, since Ray promises no order."""
    made = [Worker(*pickle.loads(pickle.dumps(of_worker))) for _ in range(workers)]
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    for number, batch in enumerate(reversed(batches)):
        answered = made[number % workers]({"pair": [pickle.dumps(pair) for pair in batch]})
        yield from map(pickle.loads, answered["answered"])


def results(folder: RunFolder) -> dict[str, Any]:
    """The label stage's results."""
    return folder.results()["label"]


def preferences(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """The rows it writes for training, by id."""
    return {row["id"]: row for row in load_from_disk(str(folder / "preferences")).to_list()}


def stopping(monkeypatch, *, every=None, at=None):
    """Interrupt a run after every ``every`` labels, or once after ``at``; returns the ids written."""
    add, written = LabelStore.add, []

    def counting(store, *arguments):
        lines = store.path.read_bytes().count(b"\n") if store.path.exists() else 0
        add(store, *arguments)
        if store.path.read_bytes().count(b"\n") > lines:
            written.append(arguments[1].id)
            if len(written) == at or (every and len(written) % every == 0):
                raise KeyboardInterrupt

    monkeypatch.setattr(LabelStore, "add", counting)
    return written
