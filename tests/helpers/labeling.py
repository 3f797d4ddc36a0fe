"""The stage label on a tiny model: pairs, the run over them, and what it leaves."""

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
    """Pairs of responses, which people judged as ``human`` says, three in turn; in both directions."""
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
    """What runs the stage label over pairs, with these keys of the section, in a folder of ``base``; the folder."""
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
    """Workers without Ray, in turn and in this process; what goes to them and comes from them is pickled. Their batches
    come backwards, as Ray promises no order."""
    made = [Worker(*pickle.loads(pickle.dumps(of_worker))) for _ in range(workers)]
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    for number, batch in enumerate(reversed(batches)):
        answered = made[number % workers]({"pair": [pickle.dumps(pair) for pair in batch]})
        yield from map(pickle.loads, answered["answered"])


def results(folder: RunFolder) -> dict[str, Any]:
    """The stage's numbers."""
    return folder.results()["label"]


def preferences(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """What it leaves for training, by id."""
    return {row["id"]: row for row in load_from_disk(str(folder / "preferences")).to_list()}


def stopping(monkeypatch, *, every=None, at=None):
    """Stop a run whenever so many labels were written, or once; what counts them."""
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
