"""Make any packaged recipe tiny."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from helpers.tiny import save_tiny_model
from trl_rlaif.recipe.paths import PathFinder
from trl_rlaif.status import read_status

# Values for these keys wherever a recipe has them, at any depth. The changes below aside, the rest stays as written.
SMALL = {
    "max_new_tokens": 4, "response_length": 4, "rationale_tokens": 4, "max_steps": 2, "num_train_epochs": 1,
    "total_episodes": 8, "num_ppo_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "selection_prompts": 4, "per_cluster": 2, "track_prompts": 2, "track_every": 1, "eval_steps": 1, "num_samples": 2,
    "embedding": "model", "optim": "adamw_torch", "policies": ["base"],
}  # fmt: skip
# Keys that bound a section's work, in case the recipe relies on their defaults.
BOUNDS = {"sft": {"max_steps": 2}, "reward": {"max_steps": 2}, "rl": {"total_episodes": 8, "response_length": 4}}
# Keys that name data, and how many rows of it are read. Calibration needs twenty pairs.
DATA = {"prompts": 8, "eval_prompts": 2, "pairs": 6, "rehearsal": 2, "data": 4, "calibration": 20}


def save_model(folder: Path) -> str:
    """Save a model for all of them: wide enough for 4-bit quantization, with a context long enough for exemplars."""
    save_tiny_model(folder, hidden_size=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return str(folder)


def assert_complete(folder: Path) -> None:
    """A run, or each variant of a comparison, has completed all stages, and there is a report."""
    for each in list(folder.glob("variants/*")) or [folder]:
        status = read_status(each)
        assert status.state == "done" and status.stages, status
    assert (folder / "report.html").stat().st_size > 0


def tiny_overrides(
    recipe: Path,
    model: str,
    folder: Path,
    *,
    small: Mapping[str, Any] = SMALL,
    bounds: Mapping[str, Mapping[str, Any]] = BOUNDS,
    data: Mapping[str, int] = DATA,
) -> Iterator[str]:
    """``--set`` values that make a recipe tiny.

    Args:
        model: The path from ``save_model``.
        folder: Where shortened data is written.
        small, bounds, data: Like the constants.
    """
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for section, of_section in bounds.items():
        if section in written:
            yield from (_set((section, key), value) for key, value in of_section.items())
    for path, value in _leaves(written):
        key, parent = path[-1], path[-2] if len(path) > 1 else None
        if key in ("path", "model") and parent in ("model", "judge"):
            yield _set(path, model)
        elif key == "backend":  # no server answers here
            yield _set(path[:-1], {"path": model})
        elif parent == "sets" or (key in data and isinstance(value, str)):
            yield _set(path, str(_first_rows(recipe, value, data.get(key, 2), folder)))
        elif key in small and value is not None:
            yield _set(path, small[key])


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value that is neither a mapping nor a list of mappings, with its path."""
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
    """Copy the first rows of a recipe's data."""
    found = Path(PathFinder.beside(recipe, None).data(name))
    short = folder / f"{rows}_{found.name}"
    short.write_text("".join(found.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    return short
