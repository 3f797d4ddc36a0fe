"""Records digests of a complete stage's files, and checks that they are unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from trl_rlaif.distributed import is_first
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.files import digest_of, digests_in, sync, to_json
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.progress import say

_DIGESTS, _NUMBERS = "digests", "numbers"


def complete(folder: RunFolder, stage: Stage, fingerprint: str) -> None:
    """Mark a stage as complete, and record digests of its output files, except checkpoints, and of its numbers.

    Only the first process does so. Stages with ``always`` record no files.
    """
    if not is_first():
        return
    kept = [name for name in stage.outputs if not name.startswith(artifacts.CHECKPOINTS)]
    kept += [artifacts.LABELS] if artifacts.LABELS in stage.companions else []  # the other companions are other stages'
    if (folder / artifacts.METRICS).exists():
        sync(folder / artifacts.METRICS)
    found = {
        f"{name}/{file}".rstrip("/"): digest
        for name in ([] if stage.always else kept)
        for file, digest in digests_in(folder / name).items()
        if not Path(file).name.startswith("cache-")  # of the datasets library, which may delete it
    }
    folder.complete(stage.name, fingerprint, {_DIGESTS: found, _NUMBERS: _numbers(folder, stage)})


def _numbers(folder: RunFolder, stage: Stage) -> dict[str, str]:
    """Digests of a stage's part of results.json and metrics.jsonl, which all stages write to."""
    parts = {artifacts.RESULTS: folder.results_of(stage.name), artifacts.METRICS: folder.metrics(stage.name)}
    return {name: hashlib.sha256(to_json(part).encode()).hexdigest() for name, part in parts.items()}


def made_together(folder: RunFolder, other: RunFolder, stage: str) -> bool:
    """Whether two runs share one execution of a complete stage, rather than two executions with the same inputs."""
    return folder.marker(stage).get(_NUMBERS) == other.marker(stage).get(_NUMBERS)


def check(folder: RunFolder, stages: Iterable[Stage], *, companions: bool = True) -> None:
    """Check that the files of complete stages are unchanged. Stages of earlier versions recorded nothing.

    Args:
        folder: The run's.
        stages: Incomplete ones are skipped.
        companions: Also check files that a stage writes besides its outputs.

    Raises:
        UserError: Files or numbers are missing or changed; with a fix for each. Changed metrics only warn.
    """
    complete_ones = [stage for stage in stages if folder.is_complete(stage.name)]
    problems = [problem for stage in complete_ones for problem in _changed(folder, stage, companions)]
    if problems:
        raise UserError.from_problems(problems)


def _changed(folder: RunFolder, stage: Stage, companions: bool) -> Iterator[Problem]:
    fix = f"Restore it, or redo the stage with --only {stage.name}."
    for name, digest in folder.marker(stage.name).get(_DIGESTS, {}).items():
        path = folder / name
        if name in stage.companions and not companions:
            continue
        if not path.is_file():
            yield Problem(f"The file that the stage '{stage.name}' wrote is gone.", str(path), fix)
        elif digest_of(path) != digest:
            yield Problem(f"The file is not what the stage '{stage.name}' wrote.", str(path), fix)
    written, now = folder.marker(stage.name).get(_NUMBERS), _numbers(folder, stage)
    for name in (name for name in now if written and now[name] != written.get(name)):
        if name == artifacts.METRICS:  # used only for curves
            say(f"Warning: the rows of the stage '{stage.name}' in {folder / name} are not what it wrote.")
            continue
        yield Problem(f"The numbers of the stage '{stage.name}' are not what it wrote.", str(folder / name), fix)
