"""Runs in processes of their own that are killed at a moment counted in steps of work, and what two runs differ in."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers import forked

# What is measured in time, or says how the command was given.
_TIMED = re.compile(r"seconds|.*_per_second|share_of_time|eps|step_time|command|time/.*|.*/time|.*_runtime|total_flos")
# What a run keeps only while it is at work, or about itself as a process.
_OWN = {"progress.json", "lock", "writable", "training_args.bin", "content.json"}


def start(recipe: Path, folder: Path, *, at: int | None = None, kind: int = signal.SIGKILL, **how: Any) -> BaseProcess:
    """Start or resume a run.

    Args:
        recipe: Its recipe.
        folder: Its folder.
        at: It is killed before its n-th change to a file or folder of ``folder``; None: it is not. How many changes a
            process made is in ``FOLDER.changes``, if it was not killed.
        kind: The signal.
        how: As of ``forked.start``.
    """
    return forked.start(_run, str(recipe), str(folder), at, kind, **how)


def changes(output: Path) -> int:
    """How many changes the last process of a run made that was not killed."""
    return int(Path(f"{output}.changes").read_text())


def _run(recipe: str, folder: str, at: int | None, kind: int) -> None:
    from matplotlib.figure import Figure

    Figure.savefig = lambda self, file, **options: file.write(b'<svg viewBox="0 0 1 1"/>')  # drawing takes longest
    counted = _count(os.path.realpath(folder), at, kind)
    try:
        forked.run_command(["run", recipe, "--output", folder, "--resume"])
    finally:
        Path(f"{folder}.changes").write_text(str(len(counted)))


def _count(folder: str, at: int | None, kind: int) -> list[str]:
    """Collect the changes below a folder, of which Python's audit events tell before each is made."""
    found: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if not path.startswith(folder + os.sep) or any(name in path for name in _OWN):
            return
        found.append(path)
        if len(found) == at:
            os.kill(os.getpid(), kind)

    sys.addaudithook(hook)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """In what two runs' folders differ, a line each: which files there are, and what is in them, but for times."""
    files = [_files(folder) for folder in (one, other)]
    found = [f"only in {one.name}: {name}" for name in sorted(files[0].keys() - files[1].keys())]
    found += [f"only in {other.name}: {name}" for name in sorted(files[1].keys() - files[0].keys())]
    for name in sorted(files[0].keys() & files[1].keys()):
        ours, theirs = (_content(folder[name]) for folder in files)
        if ours != theirs:
            found.append(f"{name}: {_first_difference(ours, theirs)}")
    return found


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path for path in paths if path.name not in _OWN}


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "recipe.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("command:")]
    return path.read_bytes()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if not _TIMED.fullmatch(key)}
    return [_untimed(part) for part in value] if isinstance(value, list) else value


def _first_difference(ours: Any, theirs: Any, where: str = "") -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *theirs]:
            if ours.get(key) != theirs.get(key):
                return _first_difference(ours.get(key), theirs.get(key), f"{where}.{key}")
    if isinstance(ours, list) and isinstance(theirs, list):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b:
                return _first_difference(a, b, f"{where}[{number}]")
        return f"{where}: {len(ours)} and {len(theirs)} entries"
    if isinstance(ours, bytes):
        return f"{len(ours)} and {len(theirs)} bytes"
    return f"{where}: {ours!r} and {theirs!r}"[:300]


def start_labeling(recipe: Path, output: Path, seconds: float) -> BaseProcess:
    """Start or resume a run whose every label takes so many seconds more."""
    return forked.start(_label, str(recipe), str(output), seconds)


def _label(recipe: str, output: str, seconds: float) -> None:
    from trl_rlaif.labels import LabelStore
    from trl_rlaif.pipeline.runner import run_recipe
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe import parse_recipe

    add = LabelStore.add

    def add_slowly(self: LabelStore, *arguments: object) -> None:
        add(self, *arguments)
        time.sleep(seconds)

    LabelStore.add = add_slowly
    plugins = installed_plugins()
    run_recipe(parse_recipe(recipe, registry=plugins.registry), plugins, output, resume=True)
