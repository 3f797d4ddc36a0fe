"""Compare the artifacts of two runs, with the size of numeric differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file

from helpers.killing import content

# Files that describe how a run was computed, or repeat its results.
_LEFT_OUT = ("recipe.yaml", "report.html", "report.md", "README.md", "state.json", "training_args.bin")
_FOLDERS = (".state", "checkpoints", "superseded", "report")


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest numeric difference per artifact of two run folders, without times.

    Returns:
        0 for identical artifacts (byte-identical if they contain no times). A difference is relative to the larger
        number if that is above 1. Infinity if anything but a number differs, or is missing from one run.
    """
    files = [_artefacts(folder) for folder in (one, other)]
    found = dict.fromkeys(sorted(files[0].keys() ^ files[1].keys()), math.inf)
    for name in sorted(files[0].keys() & files[1].keys()):
        found[name] = difference(*(_content(of[name], run) for of, run in zip(files, (one, other), strict=True)))
    return found


def _artefacts(run: Path) -> dict[str, Path]:
    paths = [path for path in run.rglob("*") if path.is_file() and path.name not in _LEFT_OUT]
    kept = [p for p in paths if not {*_FOLDERS} & {*p.relative_to(run).parts} and not p.name.startswith("cache-")]
    return {str(path.relative_to(run)): path for path in kept}


def _content(path: Path, run: Path) -> Any:
    if path.suffix == ".safetensors":
        return {name: tensor.double().flatten().tolist() for name, tensor in load_file(path).items()}
    if path.suffix == ".arrow":
        return Dataset.from_file(str(path)).to_list()
    if path.name == "labels.jsonl":
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        # A setup is a digest of, among other things, a taught judge's weights.
        return [{key: value for key, value in row.items() if key not in ("crc32", "setup")} for row in rows]
    return content(path, run)


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two values, which may be nested."""
    if ours == theirs:
        return 0.0
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return max(difference(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max(map(difference, ours, theirs))
    if type(ours) is type(theirs) is float:
        return abs(ours - theirs) / max(1.0, abs(ours), abs(theirs))
    return math.inf
