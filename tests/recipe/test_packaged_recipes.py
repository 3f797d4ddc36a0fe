"""Every packaged recipe runs to its end on a tiny model: what it names exists, and its stages fit together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny import save_tiny_model

from trl_rlaif.cli import app
from trl_rlaif.recipe import packaged_recipes
from trl_rlaif.recipe.paths import PathFinder
from trl_rlaif.status import read_status

# Where a recipe has the key, at any depth, this is its value here. Beside these, the recipe is run as it stands.
SMALL = {
    "max_new_tokens": 4, "response_length": 4, "rationale_tokens": 4, "max_steps": 2, "num_train_epochs": 1,
    "total_episodes": 8, "num_ppo_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "selection_prompts": 4, "per_cluster": 2, "track_prompts": 2, "track_every": 1, "eval_steps": 1, "num_samples": 2,
    "embedding": "model", "optim": "adamw_torch", "policies": ["base"],
}  # fmt: skip
# Keys of a section that bound its work, where the recipe relies on a default.
BOUNDS = {"sft": {"max_steps": 2}, "reward": {"max_steps": 2}, "rl": {"total_episodes": 8, "response_length": 4}}
# Keys whose value is data, and how many rows of it are read. A calibration needs twenty pairs.
DATA = {"prompts": 8, "eval_prompts": 2, "pairs": 6, "rehearsal": 2, "data": 4, "calibration": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Wide enough for four bits, and with room for a prompt with exemplars in a tokenizer of few words."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, hidden_size=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return str(folder)


def tiny_overrides(recipe: Path, model: str, folder: Path) -> Iterator[str]:
    """``--set`` values that make a recipe tiny, whatever it consists of."""
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for section, bounds in BOUNDS.items():
        if section in written:
            yield from (_set((section, key), value) for key, value in bounds.items())
    for path, value in _leaves(written):
        key, parent = path[-1], path[-2] if len(path) > 1 else None
        if key in ("path", "model") and parent in ("model", "judge"):
            yield _set(path, model)
        elif key == "backend":  # no server answers here
            yield _set(path[:-1], {"path": model})
        elif parent == "sets" or (key in DATA and isinstance(value, str)):
            yield _set(path, str(_first_rows(recipe, value, DATA.get(key, 2), folder)))
        elif key in SMALL and value is not None:
            yield _set(path, SMALL[key])


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value that is no mapping, and no list of mappings, with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for index, item in enumerate(node):
            yield from _leaves(item, (*path, index))
    else:
        yield path, node


def _set(path: tuple[Any, ...], value: Any) -> str:
    return f"{'.'.join(map(str, path))}={json.dumps(value)}"


def _first_rows(recipe: Path, name: str, rows: int, folder: Path) -> Path:
    """A copy of the beginning of a recipe's own data."""
    found = Path(PathFinder.beside(recipe, None).data(name))
    short = folder / f"{rows}_{found.name}"
    short.write_text("".join(found.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    return short


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_runs_to_its_end(name, model, tmp_path):
    changes = [word for text in tiny_overrides(packaged_recipes()[name], model, tmp_path) for word in ("--set", text)]
    app(["run", name, "--output", str(tmp_path / "out"), *changes], standalone_mode=False)
    variants = list(tmp_path.glob("out/variants/*"))  # a comparison's runs
    for folder in variants or [tmp_path / "out"]:
        status = read_status(folder)
        assert status.state == "done" and status.stages, status
    assert (tmp_path / "out" / "report.html").stat().st_size > 0
