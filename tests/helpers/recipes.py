"""Recipes on tiny models, for runs of the real stages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_rlaif import cli
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import Recipe, parse_recipe
from trl_rlaif.testing.judges import PARTS

WORDS = "quick brown fox lazy dog capital city country judge over".split()


def write_prompts(path: Path, count: int = 10, start: int = 0) -> Path:
    """Write a prompt file with ids, two categories and ``count`` different prompts."""
    rows = [
        {"id": f"p{i}", "prompt": f"what is the {WORDS[i % 10]} {i}?", "category": ("a", "b")[i % 2]}
        for i in range(start, start + count)
    ]
    return write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_prompt_folder(folder: Path) -> None:
    """Write a short judge prompt: the tiny models have a context of 512 tokens."""
    folder.mkdir()
    for name, text in PARTS.items():
        (folder / name).write_text(text)


def write_recipe(folder: Path, model_path: str, /, **sections: object) -> Path:
    """Write recipe.yaml, with tiny settings, and its prompt files; ``section=None`` leaves a section out."""
    write_prompts(folder / "train.jsonl")
    write_prompts(folder / "test.jsonl", 4, start=20)
    recipe = {
        "run": {"name": "tiny", "seed": 7},
        "model": {"path": model_path, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"prompts": "train.jsonl", "eval_prompts": "test.jsonl"},
        "sample": {"max_new_tokens": 8, "batch_size": 4},
        "label": {"batch_tokens": 2048},
        "reward": {"eval_fraction": 0.3, "per_device_train_batch_size": 4, "num_train_epochs": 2},
        "rl": {
            "total_episodes": 24,
            "per_device_train_batch_size": 4,
            "response_length": 8,
            "num_ppo_epochs": 1,
            "learning_rate": 1e-3,
            "save_steps": 1,
        },
        "evaluate": {"max_new_tokens": 8},
        "report": {},
    }
    for name, section in sections.items():
        if section is None:
            recipe.pop(name, None)
        else:
            recipe[name] = {**recipe.get(name, {}), **section}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, model_path: str, /, **sections: object) -> Recipe:
    """The same, parsed."""
    return parse_recipe(write_recipe(folder, model_path, **sections), registry=installed_plugins().registry)


def run_cli(monkeypatch, capsys, *arguments):
    """Exit code and stderr of `trl-rlaif ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, capsys.readouterr().err


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """The fingerprint of each active stage's inputs in a new run."""
    from trl_rlaif.pipeline.stages import active_stages

    found: dict[str, str] = {}
    for name, stage in active_stages(recipe).items():
        found[name] = stage.inputs(recipe, found).fingerprint
    return found
