"""Reads a run's status from its folder, where nothing is created, changed or kept locked."""

from __future__ import annotations

import json
import math
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from trl_rlaif.errors import UserError
from trl_rlaif.experiments.running import summary as summary_of_comparison
from trl_rlaif.locks import lock
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.stages import ROUND, STAGES
from trl_rlaif.recipe.variants import KEY as COMPARE
from trl_rlaif.report.formatting import label, number, section

# Only the end of metrics.jsonl is read.
_TAIL_BYTES = 256 * 1024
_FORGETTING = "forgetting/"


@dataclass(frozen=True)
class Bar:
    """A progress bar.

    Args:
        description: What is being done.
        done, total: Completed units, and all units.
        unit: Name of the unit; may be empty.
        rate: Units per second; None if unknown.
        seconds_left: Time left from now at this rate; None if unknown.
    """

    description: str
    done: int
    total: int
    unit: str
    rate: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class StageStatus:
    """A stage of the recipe.

    Args:
        name: The stage.
        state: ``interrupted`` if it has begun and no process continues it.
        seconds: Time that it took, or has taken so far; None if unknown.
        summary: Its last line of output, once it is done.
        bars: Its progress bars, the outermost first.
        step: Last logged step of a training stage, or None.
        metrics: Last logged values of the most important metrics, by name.
    """

    name: str
    state: Literal["done", "running", "interrupted", "waiting"]
    seconds: float | None = None
    summary: str = ""
    bars: tuple[Bar, ...] = ()
    step: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """The status of a run.

    Args:
        folder: Its folder.
        name: Its name.
        state: ``done`` if every stage is; ``ended`` if its command did what was asked (``--only``, ``--shard``) and
            stages are left; ``interrupted`` if no process works on it any more.
        stages: The recipe's stages, in order.
        reason: Why it was interrupted; empty if the process could not record it.
        pid, host: Of the process that runs it, or ran it last; None if unknown.
        seconds: Time since the process began; None unless it is running.
        updated_at: Time of its last report, in seconds since 1970; None if it never reported.
        resume: The command that resumes it; empty if it is done or running, cannot be resumed by a command, or was
            not started by one.
        resume_in: The folder in which that command was given.
    """

    folder: str
    name: str
    state: Literal["running", "done", "ended", "interrupted"]
    stages: tuple[StageStatus, ...]
    reason: str = ""
    pid: int | None = None
    host: str | None = None
    seconds: float | None = None
    updated_at: float | None = None
    resume: str = ""
    resume_in: str = ""


def read_status(folder: str | Path) -> Status:
    """Read the status of the run in a folder.

    The stages of a comparison are its variants, each with the progress bars of its own run, followed by ``compare``;
    those of a run in rounds are the rounds, likewise, followed by the stages outside of rounds, such as ``report``.

    Raises:
        UserError: The folder does not contain a run.
    """
    folder = Path(folder)
    recipe = _recipe(folder)
    # Checked first, so that everything read afterwards is at least as recent.
    alive = _is_locked(folder / artifacts.STATE / artifacts.LOCK)
    found = _object(folder / artifacts.STATE / artifacts.PROGRESS), _object(folder / artifacts.RESULTS)
    read = _Read(folder, alive, *found, time.time())
    progress, prints = read.progress, read.progress.get("stages") or dict.fromkeys(_stages_of(recipe))
    if COMPARE in recipe:
        stages = (
            *(_run_within(name, folder / artifacts.VARIANTS / name, alive) for name in _variants_of(recipe)),
            read.comparison(),
        )
    elif count := _rounds_of(recipe):
        rounds = {f"round {n}": folder / artifacts.ROUNDS / str(n) for n in range(1, count + 1)}
        ends = [name for name in _stages_of(recipe) if name not in ROUND]
        stages = (
            *(_run_within(name, place, alive) for name, place in rounds.items()),
            *(read.stage(n, prints.get(n)) for n in ends),
        )
    else:
        stages = tuple(read.stage(name, fingerprint) for name, fingerprint in prints.items())
    state = "running" if alive else "ended" if progress.get("outcome") == "done" else "interrupted"
    if stages and not alive and all(stage.state == "done" for stage in stages):
        state = "done"
    resume = _resume(recipe.get("command"), state)
    run = recipe.get("run")
    return Status(
        folder=str(folder),
        name=label(run.get("name") if isinstance(run, dict) else None) or folder.resolve().name,
        state=state,
        stages=stages,
        reason=_one_line(progress.get("outcome")) if state == "interrupted" else "",
        pid=progress.get("pid"),
        host=progress.get("host"),
        seconds=max(read.now - progress["started_at"], 0) if alive and "started_at" in progress else None,
        updated_at=progress.get("updated_at"),
        resume=resume,
        resume_in=progress.get("cwd", "") if resume else "",
    )


def _run_within(name: str, folder: Path, alive: bool) -> StageStatus:
    """A variant of a comparison, or a round, as a stage: the status of its own run."""
    if not (folder / artifacts.RECIPE).is_file():
        return StageStatus(name, "waiting")
    run = read_status(folder)
    if run.state == "done":
        seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
        last = next((stage for stage in reversed(run.stages) if stage.summary), None)
        return StageStatus(name, "done", sum(seconds), last.summary if last else "")
    at = next((stage for stage in run.stages if stage.state in ("running", "interrupted")), None)
    if at is None:
        return StageStatus(name, "waiting" if alive else "interrupted")
    bars = at.bars or (Bar(at.name, 0, 0, "", None, None),)
    return StageStatus(name, at.state, run.seconds, "", bars, at.step, at.metrics)


@dataclass(frozen=True)
class _Read:
    """Contents of a run's folder at one moment."""

    folder: Path
    alive: bool
    progress: dict[str, Any]
    results: dict[str, Any]
    now: float

    def stage(self, name: str, fingerprint: str | None) -> StageStatus:
        """A stage's status, from its marker in ``.state``, the process's progress file, and its results."""
        marker = _object(self.folder / artifacts.STATE / artifacts.marker_of(name))
        numbers = section(self.results, name)
        current = self.progress.get("stage") == name and self.progress.get("outcome") is None
        if self.alive and current:
            return self._running(name)
        # A stage completed with other settings will be redone.
        if marker.get("complete") and fingerprint in (None, marker.get("fingerprint")):
            return StageStatus(name, "done", number(numbers.get("seconds")), _summary(name, numbers))
        if numbers.get("shard"):
            return StageStatus(name, "waiting", number(numbers.get("seconds")), f"share {numbers['shard']} is done")
        if self.alive or not marker or marker.get("complete"):
            return StageStatus(name, "waiting")
        step, metrics = _last_metrics(self.folder / artifacts.METRICS, name)
        bars = self._bars() if self.progress.get("stage") == name else ()
        return StageStatus(name, "interrupted", bars=bars, step=step, metrics=metrics)

    def comparison(self) -> StageStatus:
        """The judging of all variants against each other. It has no marker: its results are written last."""
        if self.alive:
            return self._running(COMPARE) if self.progress.get("stage") == COMPARE else StageStatus(COMPARE, "waiting")
        numbers = section(self.results, COMPARE)
        if numbers and self.progress.get("outcome") == "done":
            return StageStatus(COMPARE, "done", number(numbers.get("seconds")), _summary(COMPARE, numbers))
        return StageStatus(COMPARE, "interrupted" if self.progress.get("stage") == COMPARE else "waiting")

    def _running(self, name: str) -> StageStatus:
        seconds = max(self.now - self.progress.get("stage_started_at", self.now), 0)
        step, metrics = _last_metrics(self.folder / artifacts.METRICS, name)
        return StageStatus(name, "running", seconds, "", self._bars(), step, metrics)

    def _bars(self) -> tuple[Bar, ...]:
        """The written bars, with the time left reduced by their age."""
        age = max(self.now - self.progress.get("updated_at", self.now), 0)
        return tuple(_bar(bar, age if self.alive else None) for bar in self.progress.get("bars", ()))


def _bar(bar: dict[str, Any], age: float | None) -> Bar:
    """A bar written ``age`` seconds ago; None if no process works on it any more."""
    left = bar.get("seconds_left")
    return Bar(
        description=_one_line(bar.get("description")),
        done=bar.get("done", 0),
        total=bar.get("total", 0),
        unit=_one_line(bar.get("unit")),
        rate=None if age is None else bar.get("rate"),
        seconds_left=None if age is None or left is None else max(left - age, 0.0),
    )


def _one_line(text: Any) -> str:
    return label(text, 300)


def _is_locked(path: Path) -> bool:
    """Whether a process holds a run's lock (see ``RunFolder.locked``).

    Requesting a shared lock needs no write permission. If granted, it is released at once.
    """
    try:
        with path.open("rb") as file:
            lock(file, shared=True, wait=False)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / artifacts.RECIPE
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if (folder / artifacts.STATE).is_dir() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise UserError(
            "This is not a run's folder: it has no readable recipe.yaml."
            if folder.is_dir()
            else "There is no such folder.",
            where=str(folder),
            fix="Name the folder that `trl-rlaif run` wrote.",
        )
    artifacts.check_format(recipe, str(folder))
    return recipe


def _summary(stage: str, numbers: dict[str, Any]) -> str:
    """A stage's line about its results; empty if there are none, or they have an unknown format."""
    try:
        told = summary_of_comparison(numbers) if stage == COMPARE else STAGES[stage].line(numbers)
        return _one_line(told) if numbers else ""
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""


def _stages_of(recipe: dict[str, Any]) -> list[str]:
    """The stages of a resolved recipe, for a run that has not recorded its own."""
    data = recipe.get("data") or {}
    return [s for s in STAGES if s in recipe or (s == "sample" and isinstance(data, dict) and data.get("pairs"))]


def _rounds_of(recipe: dict[str, Any]) -> int:
    """Number of rounds in a resolved recipe; 0 for a single run."""
    count = number(section(recipe, "rounds").get("number"))
    return int(count) if count and count > 1 else 0


def _variants_of(recipe: dict[str, Any]) -> list[str]:
    """The names of a resolved recipe's variants."""
    variants = recipe[COMPARE] if isinstance(recipe[COMPARE], list) else []
    return [name for variant in variants if isinstance(variant, dict) for name in variant if isinstance(name, str)]


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_metrics(path: Path, stage: str) -> tuple[int | None, dict[str, float | None]]:
    """The last logged step of a stage, and the latest value of each metric shown."""
    told, step, found = STAGES[stage].told if stage in STAGES else (), None, {}
    for row in reversed(_tail(path)):
        if row.get("stage") != stage:
            continue
        step = row.get("step") if step is None else step
        for name, value in row.items():
            if name not in found and (name in told or (name.startswith(_FORGETTING) and name.endswith("/win_rate"))):
                found[name] = value if isinstance(value, int | float) and math.isfinite(value) else None
    ordered = sorted(found, key=lambda name: (name not in told, told.index(name) if name in told else 0, name))
    return step, {name: found[name] for name in ordered}


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a file that may be being written; truncated lines are skipped."""
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, 2) - _TAIL_BYTES, 0)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[1 if start else 0 : -1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _resume(command: Any, state: str) -> str:
    """The recorded command, with --resume; empty if there is nothing to resume, or the run was started from Python."""
    if state not in ("ended", "interrupted") or not isinstance(command, str):
        return ""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    if state == "ended":
        if any(word.partition("=")[0] == "--shard" for word in words):
            return ""  # labels of all machines must be joined first
        kept = [word for before, word in zip(["", *words], words, strict=False) if before != "--only"]
        words = [word for word in kept if word.partition("=")[0] != "--only"]
    return shlex.join(words if "--resume" in words else [*words, "--resume"]) if words else ""
