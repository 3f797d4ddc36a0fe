"""What a complete stage left in the run's folder, and whether it is still that."""

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
    """Close a stage, and record the digest of every file that it left, but for its checkpoints.

    Of several processes the first does so.
    """
    if not is_first():
        return
    kept = [name for name in stage.outputs if not name.startswith(artifacts.CHECKPOINTS)]
    kept += [artifacts.LABELS] if artifacts.LABELS in stage.companions else []  # other companions are other stages'
    if (folder / artifacts.METRICS).exists():
        sync(folder / artifacts.METRICS)
    found = {
        f"{name}/{file}".rstrip("/"): digest
        for name in ([] if stage.always else kept)
        for file, digest in digests_in(folder / name).items()
        if not Path(file).name.startswith("cache-")  # of the datasets library, which may clear it
    }
    folder.complete(stage.name, fingerprint, {_DIGESTS: found, _NUMBERS: _numbers(folder, stage)})


def _numbers(folder: RunFolder, stage: Stage) -> dict[str, str]:
    """A digest of a stage's share of each file that it has in common with others."""
    parts = {artifacts.RESULTS: folder.results_of(stage.name), artifacts.METRICS: folder.metrics(stage.name)}
    return {name: hashlib.sha256(to_json(part).encode()).hexdigest() for name, part in parts.items()}


def made_together(folder: RunFolder, other: RunFolder, stage: str) -> bool:
    """Whether a complete stage of one run is a copy of that of another; the same inputs may have been used twice."""
    return folder.marker(stage).get(_NUMBERS) == other.marker(stage).get(_NUMBERS)


def check(folder: RunFolder, stages: Iterable[Stage], *, companions: bool = True) -> None:
    """Compare what complete stages left with what they wrote. Stages of earlier versions recorded nothing.

    Args:
        folder: The run's.
        stages: Those that are not complete are left out.
        companions: What a stage writes besides its outputs is compared, too.

    Raises:
        UserError: A file is gone or another one; each with what to do.
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
        if name == artifacts.METRICS:  # curves alone are drawn from it
            say(f"Warning: the rows of the stage '{stage.name}' in {folder / name} are not what it wrote.")
            continue
        yield Problem(f"The numbers of the stage '{stage.name}' are not what it wrote.", str(folder / name), fix)
