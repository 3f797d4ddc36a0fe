"""A run's folder: which stages are complete, their results, and the lock that admits one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import yaml

from trl_rlaif.distributed import is_first
from trl_rlaif.errors import UserError
from trl_rlaif.files import (
    naming_a_full_disk,
    read_lines,
    read_state,
    sealed,
    to_json,
    to_line,
    write_atomically,
    write_state,
)
from trl_rlaif.locks import lock
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.results import Results


class RunFolder:
    """The folder of one run.

    Args:
        path: Created if missing.

    Raises:
        UserError: It cannot be created or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(exist_ok=True)
            probe = self.state / "writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process of the run may have removed it
        except OSError as error:
            raise UserError(
                f"The output folder cannot be written to: {error.strerror}.",
                where=str(self.path),
                fix="Name another one with --output.",
            ) from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def state(self) -> Path:
        """The folder of the run's internal state."""
        return self.path / artifacts.STATE

    def round(self, number: int) -> RunFolder:
        """The folder of a round, counted from 1."""
        return RunFolder(self.path / artifacts.ROUNDS / str(number))

    @property
    def is_used(self) -> bool:
        """Whether the folder already contains a run."""
        return (self / artifacts.RECIPE).exists()

    def recipe(self) -> dict[str, Any]:
        """recipe.yaml; {} if the run has not started.

        Raises:
            UserError: A later version wrote it, or it cannot be read.
        """
        if not self.is_used:
            return {}
        try:
            found = yaml.safe_load((self / artifacts.RECIPE).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise UserError("recipe.yaml cannot be read.", where=str(self.path), fix="Restore the run's own copy.")
        artifacts.check_format(found, str(self.path))
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder while a run writes to it; the lock ends with the process.

        Raises:
            UserError: Another process holds the lock.
            RunError: The code inside fails because the disk is full.
        """
        with naming_a_full_disk(self.path):
            with self._locked() if is_first() else nullcontext():
                yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.state / artifacts.LOCK).open("w") as file:
            try:
                lock(file, wait=False)
            except BlockingIOError:
                raise UserError("Another process is running in this folder.", where=str(self.path)) from None
            yield

    # ---- Stages ---------------------------------------------------------------------------------------

    def marker(self, stage: str) -> dict[str, Any]:
        """A stage's ``fingerprint``, its ``inputs``, and whether it is ``complete``; {} before it has started."""
        path = self.state / artifacts.marker_of(stage)
        without = "Without it, --resume makes the stage again."
        return read_state(path, without, lambda found: isinstance(found.get("fingerprint"), str))

    def write_marker(self, stage: str, marker: dict[str, Any]) -> None:
        """Replace a stage's marker."""
        write_state(self.state / artifacts.marker_of(stage), marker)

    def is_complete(self, stage: str, fingerprint: str | None = None) -> bool:
        """Whether a stage is complete; with a fingerprint, whether it is complete with exactly these inputs."""
        marker = self.marker(stage)
        whole = marker.get("complete") and "superseding" not in marker  # else killed before it was moved
        return bool(whole) and fingerprint in (None, marker.get("fingerprint"))

    def is_begun(self, stage: str, fingerprint: str) -> bool:
        """Whether a stage was started with exactly these inputs, and is not complete."""
        marker = self.marker(stage)
        return marker.get("fingerprint") == fingerprint and not marker.get("complete") and "superseding" not in marker

    def begin(self, stage: str, fingerprint: str, inputs: dict[str, Any] | None = None) -> None:
        """Mark a stage as started."""
        known = {"fingerprint": fingerprint, "complete": False}
        self.write_marker(stage, known if inputs is None else known | {"inputs": inputs})

    def complete(self, stage: str, fingerprint: str, more: Mapping[str, Any] | None = None) -> None:
        """Mark a stage as complete: ``--resume`` skips it from now on."""
        self.write_marker(stage, self.marker(stage) | {"fingerprint": fingerprint, "complete": True, **(more or {})})
        self.drop_work(stage)

    def drop_work(self, stage: str) -> None:
        """Remove files that a stage needed until it was complete."""
        if is_first():
            shutil.rmtree(self.state / artifacts.work_of(stage), ignore_errors=True)

    # ---- Results and metrics --------------------------------------------------------------------------

    def results(self) -> Results:
        """The results of every completed stage."""
        without = "Without it the report lacks the numbers of all stages."
        found = read_state(
            self / artifacts.RESULTS, without, lambda found: all(isinstance(part, dict) for part in found.values())
        )
        return cast(Results, found)

    def results_of(self, stage: str) -> dict[str, Any]:
        """One stage's results; {} before it is complete."""
        return dict(self.results()).get(stage) or {}

    def add_results(self, stage: str, numbers: Mapping[str, Any]) -> None:
        """Write one stage's results to results.json."""
        results = self.results() | {stage: numbers}
        write_atomically(self / artifacts.RESULTS, to_json(results, indent=2))

    def drop_results(self, stage: str) -> None:
        """Remove one stage's results."""
        results = self.results()
        if results.pop(stage, None) is not None:
            write_atomically(self / artifacts.RESULTS, to_json(results, indent=2))

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """A stage's rows of metrics.jsonl."""
        return [row for row in read_lines(self / artifacts.METRICS) if row.get("stage") == stage]

    def add_metrics(self, stage: str, step: int, numbers: dict[str, Any]) -> None:
        """Append a logged step to metrics.jsonl."""
        if is_first():
            with (self / artifacts.METRICS).open("a", encoding="utf-8", newline="\n") as file:
                file.write(to_line(sealed({"stage": stage, "step": step, **numbers})))

    def drop_metrics(self, stage: str, after: int = -1) -> None:
        """Remove a stage's metrics after a step, which will be computed again."""
        if not is_first():
            return
        rows = read_lines(self / artifacts.METRICS)
        kept = [r for r in rows if r.get("stage") != stage or r.get("step", 0) <= after]
        if len(kept) < len(rows):
            write_atomically(self / artifacts.METRICS, "".join(to_line(sealed(row)) for row in kept))
