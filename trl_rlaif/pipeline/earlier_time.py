"""The time that an earlier run took for the same stages: the only estimate before a run computes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif.errors import TrlRlaifError
from trl_rlaif.files import read_state, unsealed
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.redo import Planned
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import Stage

# Maximum number of neighboring run folders to check, the newest first.
_MOST_RUNS = 20


def earlier_time(
    folder: RunFolder, planned: Mapping[str, Planned], ahead: Sequence[Stage], processor: str
) -> tuple[str, float] | None:
    """A description of the newest complete run in the same parent folder that differs at most in its seed, and its
    seconds in the stages ahead; None without one. In a run with rounds, it is an earlier round.

    Args:
        folder: The run's folder.
        planned: All its stages, whose settings and files must be identical.
        ahead: The stages whose time is needed.
        processor: Name of the processor, which must be identical.
    """
    results: list[Path] = []
    with suppress(OSError):  # another process may remove a folder
        found = folder.path.parent.glob(f"*/{artifacts.RESULTS}")
        results = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:_MOST_RUNS]
    for path in results:
        # Another run's folder may be of another version or damaged, which is not this run's concern.
        with suppress(TrlRlaifError, OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            if path.parent != folder.path and _is_alike(path.parent, planned, processor):
                numbers = read_state(path, "")
                name = path.parent.name
                in_rounds = folder.path.parent.name == artifacts.ROUNDS
                called = f"round {name}" if in_rounds else f"the run '{name}' in the same folder"
                return called, sum(numbers[stage.name]["seconds"] for stage in ahead)
    return None


def _is_alike(run: Path, planned: Mapping[str, Planned], processor: str) -> bool:
    for name, each in planned.items():
        marker = read_state(run / artifacts.STATE / artifacts.marker_of(name), "")
        if not marker.get("complete") or _content(marker["inputs"]) != _content(each.inputs.to_dict()):
            return False
    recipe = yaml.safe_load((run / artifacts.RECIPE).read_text(encoding="utf-8"))
    return bool(unsealed(recipe["machine"])["processor"] == processor)


def _content(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and digests of files, without the seed."""
    settings = {key: value for key, value in inputs["settings"].items() if key != "run.seed"}
    return settings, {key: file["digest"] for key, file in inputs["files"].items()}
