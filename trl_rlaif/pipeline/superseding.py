"""A stage's outputs are never deleted: if it is redone, they move to ``superseded/``, and can be restored."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_rlaif.distributed import is_first
from trl_rlaif.files import sealed, to_line, write_atomically, write_folder
from trl_rlaif.pipeline import artifacts, digests
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.pipeline.stages import STAGES

_MOVING = "superseding"


def begin(folder: RunFolder, stage: Stage, fingerprint: str, inputs: dict[str, Any] | None = None) -> None:
    """Start a stage, after moving away outputs that are complete or from other inputs."""
    marker = folder.marker(stage.name)
    if not stage.always and (marker.get("fingerprint") != fingerprint or marker.get("complete")):
        supersede(folder, [stage])
    folder.begin(stage.name, fingerprint, inputs)


def supersede(folder: RunFolder, stages: Sequence[Stage]) -> Path | None:
    """Move everything from these stages to a new folder in ``superseded/``: outputs, results, metrics and markers.

    After a kill, ``finish`` completes the move.

    Returns:
        The new folder; None if the stages have not started, or in other processes than the first.
    """
    begun = [stage.name for stage in stages if folder.marker(stage.name)]
    if not begun or not is_first():
        return None
    name = first = time.strftime("%Y-%m-%dT%H-%M-%S")
    number = 1
    while (folder / artifacts.SUPERSEDED / name).exists():
        number += 1
        name = f"{first}_{number}"
    for stage in begun:
        folder.write_marker(stage, folder.marker(stage) | {_MOVING: name})
    finish(folder)
    return folder / artifacts.SUPERSEDED / name


def is_moving(marker: Mapping[str, Any]) -> bool:
    """Whether moving a stage away is pending or incomplete."""
    return _MOVING in marker


def finish(folder: RunFolder) -> None:
    """Complete a ``supersede`` interrupted by a kill."""
    if is_first():
        for stage in STAGES.values():
            marker = folder.marker(stage.name)
            if _MOVING in marker:
                _move(folder, stage, RunFolder(folder / artifacts.SUPERSEDED / marker.pop(_MOVING)), marker)


def _move(folder: RunFolder, stage: Stage, target: RunFolder, marker: dict[str, Any]) -> None:
    """Every step may be repeated after a kill; the marker that requests them is removed last."""
    folder.drop_work(stage.name)
    for name in stage.outputs:
        if (folder / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, target / name)
    rows = folder.metrics(stage.name)
    if rows:
        target.drop_metrics(stage.name)
        _add_metrics(target, stage.name, rows)
        folder.drop_metrics(stage.name)
    results = folder.results_of(stage.name)
    if results:
        target.add_results(stage.name, results)
        folder.drop_results(stage.name)
    target.write_marker(stage.name, marker)
    (folder.state / artifacts.marker_of(stage.name)).unlink()


def _add_metrics(folder: RunFolder, stage: str, rows: Sequence[dict[str, Any]]) -> None:
    path = folder / artifacts.METRICS
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, before + "".join(to_line(sealed(row)) for row in rows))


def donors(folder: RunFolder) -> list[RunFolder]:
    """Superseded outputs, newest first: a run whose setting is restored reuses the outputs made with it."""
    found = sorted((folder / artifacts.SUPERSEDED).glob("*/.state"), key=lambda state: state.parent.name, reverse=True)
    return [RunFolder(state.parent) for state in found]


def adopt(folder: RunFolder, stage: Stage, fingerprint: str, donor: RunFolder, inputs: dict[str, Any]) -> None:
    """Copy a complete stage of another run: outputs without checkpoints, missing companions, results and metrics."""
    digests.check(donor, [stage], companions=False)  # labels.jsonl is never moved
    supersede(folder, [stage])
    folder.begin(stage.name, fingerprint, inputs)
    outputs = [name for name in stage.outputs if name != artifacts.checkpoints_of(stage.name)]
    companions = [name for name in stage.companions if not (folder / name).exists()]
    if artifacts.LABELS in stage.companions and all((run / artifacts.LABELS).exists() for run in (folder, donor)):
        _add_labels(folder, donor)
    for name in (*outputs, *companions):
        source = donor / name
        if source.is_dir():
            write_folder(folder / name, lambda new, source=source: _copy_into(source, new))
        elif source.exists():
            write_atomically(folder / name, source.read_text(encoding="utf-8"))
    _add_metrics(folder, stage.name, donor.metrics(stage.name))
    folder.add_results(stage.name, donor.results_of(stage.name))
    digests.complete(folder, stage, fingerprint)


def _add_labels(folder: RunFolder, donor: RunFolder) -> None:
    """Append another run's labels that this one lacks."""
    own = (folder / artifacts.LABELS).read_text(encoding="utf-8")
    known = set(own.splitlines())
    theirs = donor / artifacts.LABELS
    more = [line for line in theirs.read_text(encoding="utf-8").splitlines() if line not in known]
    if more:
        write_atomically(folder / artifacts.LABELS, own + "".join(f"{line}\n" for line in more))


def _copy_into(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
