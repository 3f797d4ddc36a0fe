"""Prints a run's status, as text or JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trl_rlaif.progress import pace
from trl_rlaif.report.formatting import clean, duration
from trl_rlaif.status.snapshot import Bar, StageStatus, Status, read_status

# Interval of --watch.
WATCH_SECONDS = 2.0


def follow(folder: str | Path, seconds: float = WATCH_SECONDS) -> Iterator[Status]:
    """Yield the status repeatedly, until the run is no longer running.

    Raises:
        UserError: As in ``read_status``.
    """
    while True:
        found = read_status(folder)
        yield found
        if found.state != "running":
            return
        time.sleep(seconds)


def show(folder: str | Path, *, watch: bool = False, as_json: bool = False) -> None:
    """Print a run's status on stdout.

    Args:
        folder: The run's folder.
        watch: Repeat until the run ends or the user presses Ctrl-C; a terminal is redrawn.
        as_json: Print one line of JSON each time.

    Raises:
        UserError: As in ``read_status``.
    """
    found = follow(folder) if watch else iter([read_status(folder)])
    with suppress(KeyboardInterrupt):
        if as_json:
            for status in found:
                print(json.dumps(asdict(status)), flush=True)
            return
        terminal = Console(highlight=False)
        if not (watch and terminal.is_terminal):
            for status in found:
                print(describe(status), flush=True)
            return
        with Live(console=terminal, auto_refresh=False) as live:
            for status in found:
                live.update(Text(describe(status)), refresh=True)


def describe(status: Status) -> str:
    """A line for the run, one for each stage, and how to resume it if it has stopped."""
    lines = [f"{status.name} ({status.folder}): {_of_run(status)}"]
    width = max([10, *(len(stage.name) + 2 for stage in status.stages)])
    lines += [f"  {stage.name:<{width}}{_of_stage(stage)}" for stage in status.stages]
    lines += [f"            {_of_metrics(stage)}" for stage in status.stages if stage.metrics]
    if status.state == "interrupted":
        lines.append("Finished work is kept; continue with --resume.")
    if status.resume:
        lines.append(f"Go on with: {status.resume}" + (f"   (in {status.resume_in})" if status.resume_in else ""))
    return "\n".join(clean(line) for line in lines)


def _of_run(status: Status) -> str:
    process = f"process {status.pid} on {status.host}" if status.pid else "its process has not reported yet"
    if status.state == "running":
        since = f" for {duration(status.seconds)}" if status.seconds is not None else ""
        return f"running{since} ({process})"
    if status.state == "done":
        return "done"
    if status.state == "ended":
        return "ended as asked; stages are left"
    return "interrupted" + (f": {status.reason}" if status.reason else "; no process works on it")


def _of_stage(stage: StageStatus) -> str:
    took = duration(stage.seconds)
    if stage.state == "done":
        return f"done{f' in {took}' if took else ''}{f'. {stage.summary}' if stage.summary else ''}"
    if stage.state == "waiting":
        return f"waiting{f'; {stage.summary}' if stage.summary else ''}"
    bars = [bar.description + (f" {bar.done} of {bar.total}{_pace(bar)}" if bar.total else "") for bar in stage.bars]
    since = f" for {took}" if took and stage.state == "running" else ""
    return f"{stage.state}{since}{': ' if bars else ''}{'; '.join(bars)}"


def _pace(bar: Bar) -> str:
    words = pace(bar.rate, bar.seconds_left, bar.unit)
    return f" ({words})" if words else ""


def _of_metrics(stage: StageStatus) -> str:
    numbers = ", ".join(f"{name} {'nan' if value is None else f'{value:.4g}'}" for name, value in stage.metrics.items())
    return f"step {stage.step}: {numbers}"
