"""Progress of a run: bars on stderr, lines without a terminal, and a small file for ``trl-rlaif status``."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from trl_rlaif.distributed import is_first
from trl_rlaif.pipeline.artifacts import PROGRESS
from trl_rlaif.report.formatting import duration
from trl_rlaif.terminal import escaped

console = Console(stderr=True, highlight=False, quiet=not is_first())

# Seconds between lines without a terminal, where bars cannot be redrawn.
LINE_SECONDS = 30.0
# Minimum seconds between writes of a run's progress to its folder.
PUBLISH_SECONDS = 1.0
# Seconds of computation after which a run's total time is predicted.
ESTIMATE_AFTER = 60.0


@dataclass
class Meter:
    """The state of a progress bar.

    Args:
        description: What is being done.
        total: Total number of units.
        done: Number of completed units; those completed before the meter started do not count for the rate.
        unit: Name of the unit, in the plural; may be empty.
    """

    description: str
    total: int
    done: int = 0
    unit: str = ""
    first: int = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.started = self.done, time.monotonic()

    @property
    def rate(self) -> float | None:
        """Units per second since the meter started; None before the first unit, or if the total is one unit."""
        if self.total <= 1:
            return None
        seconds, made = time.monotonic() - self.started, self.done - self.first
        return made / seconds if made > 0 and seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at this rate; None if the rate is unknown."""
        rate = self.rate
        return max(self.total - self.done, 0) / rate if rate else None

    def to_dict(self) -> dict[str, Any]:
        """Its entry in the progress file."""
        return {
            "description": self.description,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": self.rate,
            "seconds_left": self.seconds_left,
        }


def pace(rate: float | None, seconds_left: float | None, unit: str = "") -> str:
    """``3.2 pairs/s, 25 s left``; slow rates per minute or per hour. Empty if the rate is unknown."""
    if not rate:
        return ""
    per, seconds = next(((p, s) for p, s in (("s", 1), ("min", 60)) if rate * s >= 1), ("h", 3600))
    amount = rate * seconds
    speed = f"{amount:.0f}" if amount >= 100 else f"{amount:.1f}"
    left = f", {duration(seconds_left)} left" if seconds_left is not None else ""
    return f"{speed}{' ' + unit if unit else ''}/{per}{left}"


# The bars currently shown, the outermost first.
_open: list[Meter] = []


@contextmanager
def progress_bar(description: str, total: int, done: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left; yields a function that adds completed units. Bars may be nested.

    Args:
        description: What is being done.
        total: Total number of units.
        done: Number of units already completed.
        unit: Name of the unit, in the plural, for the rate: ``pairs`` gives ``3.2 pairs/s``.
    """
    meter = Meter(description, total, done, unit)
    show = _drawn if console.is_terminal else _written
    _open.append(meter)
    _publish(at_once=True)
    try:
        with show(meter) as shown:

            def advance(count: int) -> None:
                meter.done += count
                shown()
                _publish()

            yield advance
    finally:
        _open.remove(meter)
        _publish(at_once=True)


class _Pace(ProgressColumn):
    """Rate and time left, as formatted by ``pace``."""

    def render(self, task: Task) -> Text:
        meter: Meter = task.fields["meter"]
        return Text(pace(meter.rate, meter.seconds_left, meter.unit))


_columns = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    _Pace(),
)
# A terminal can show one live display: nested bars are lines of it.
_display: Progress | None = None


@contextmanager
def _drawn(meter: Meter) -> Iterator[Callable[[], None]]:
    global _display
    outermost = _display is None
    if outermost:
        _display = Progress(*_columns, console=console, transient=True)
        _display.start()
    display = _display
    task = display.add_task(escaped(meter.description), total=meter.total, completed=meter.done, meter=meter)
    try:
        yield lambda: display.update(task, completed=meter.done)
    finally:
        display.remove_task(task)
        if outermost:
            _display = None
            display.stop()


@contextmanager
def _written(meter: Meter) -> Iterator[Callable[[], None]]:
    last = meter.started

    def write() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            words = pace(meter.rate, meter.seconds_left, meter.unit)
            say(f"  {meter.description}: {meter.done} of {meter.total}" + (f", {words}" if words else ""))

    yield write


def say(message: str) -> None:
    """Print one line on stderr; its text is never parsed as markup."""
    console.print(escaped(message), markup=False, soft_wrap=True)


# ---- The file that `trl-rlaif status` reads ---------------------------------------------------------------


@dataclass
class Forecast:
    """Advance estimate of the computation of a run's stages.

    Args:
        shares: Fraction of all estimated computation by stage; they add up to 1.
        unknown: Stages without an estimate.
        measured: Stages whose outermost bar shows their progress.
    """

    shares: dict[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    measured: Collection[str] = ()


def _spent(path: Path) -> dict[str, float]:
    """Seconds of uncompleted work by stage, from an earlier process's progress file; {} if there is none."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        spent, stage = dict(before.get("spent", {})), before["stage"]
        if stage is not None and before["outcome"] != "done":
            seconds = max(before["updated_at"] - before["stage_started_at"], 0.0)
            spent[stage] = before.get("stage_seconds_before", 0.0) + seconds
        return {str(name): float(seconds) for name, seconds in spent.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # the file is only informative
        return {}


class Publisher:
    """Updates ``progress.json`` in a run's folder, at most once per second, and never fails a run.

    After the first minute, it prints how long the run will take.

    Args:
        path: The file.
        stages: The run's stages in order, each with its fingerprint.
        forecast: Estimate of the stages' computation.
    """

    def __init__(self, path: Path, stages: Mapping[str, str], forecast: Forecast | None = None) -> None:
        self._path, self._last = path, 0.0
        self._forecast, self._made, self._computing = forecast or Forecast(), 0.0, 0.0
        now = time.time()
        self._spent = _spent(path)
        self._state: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "cwd": os.getcwd(),
            "stages": dict(stages),
            "stage": None,
            "started_at": now,
            "stage_started_at": now,
            "outcome": None,
        }

    def begin(self, stage: str, *, resumed: bool = False) -> float:
        """Set the current stage.

        Args:
            stage: The stage.
            resumed: It continues what an earlier process began.

        Returns:
            Seconds that earlier processes spent on the resumed work.
        """
        self._finish(self._state["stage"])
        before = self._spent.pop(stage, 0.0)
        before = before if resumed else 0.0
        self._state |= {"stage": stage, "stage_started_at": time.time(), "stage_seconds_before": before}
        self.publish(at_once=True)
        return before

    def _finish(self, stage: str | None) -> None:
        """Count a stage that has ended as completed."""
        share = self._forecast.shares.pop(stage, 0.0) if stage else 0.0
        if share:
            self._made += share
            self._computing += time.time() - self._state["stage_started_at"]

    def skip(self, stage: str) -> None:
        """Remove a stage, which need not be computed, from the forecast."""
        self._forecast.shares.pop(stage, None)

    def _estimate(self) -> None:
        """Print once how long the run will take, after a minute of computation and 1% of the total."""
        stage, shares, outermost = self._state["stage"], self._forecast.shares, _open[0] if _open else None
        if stage not in shares or stage not in self._forecast.measured or outermost is None or not outermost.total:
            return
        seconds = self._computing + time.time() - self._state["stage_started_at"]
        made = self._made + shares[stage] * (outermost.done - outermost.first) / outermost.total
        if seconds < ESTIMATE_AFTER or made < 0.01:
            return
        left = (sum(shares.values()) - shares[stage] * outermost.done / outermost.total) * seconds / made
        without = f", without {', '.join(self._forecast.unknown)}" if self._forecast.unknown else ""
        self._forecast = Forecast()
        whole = duration(time.time() - self._state["started_at"] + left)
        say(f"The run will take about {whole} in total{without}, at its current pace.")

    def end(self, outcome: str) -> None:
        """Record how the run ended: ``done``, or why it stopped."""
        self._state["outcome"] = outcome
        self.publish(at_once=True)

    def publish(self, *, at_once: bool = False) -> None:
        """Write the current state, if due."""
        if not is_first():
            return
        now = time.monotonic()
        if not at_once and now - self._last < PUBLISH_SECONDS:
            return
        self._last = now
        self._estimate()
        bars = [meter.to_dict() for meter in _open]
        text = json.dumps(self._state | {"updated_at": time.time(), "bars": bars, "spent": self._spent})
        building = self._path.with_name(f".{self._path.name}.building")
        try:
            # Not synced to disk: readers only need a complete file, and writing must cost nothing.
            building.write_text(text, encoding="utf-8")
            os.replace(building, self._path)
        except OSError:
            pass  # a full disk must not end a run for the sake of its progress


_publisher: Publisher | None = None


def _publish(*, at_once: bool = False) -> None:
    if _publisher is not None:
        _publisher.publish(at_once=at_once)


@contextmanager
def publishing(state: Path, stages: Mapping[str, str], forecast: Forecast | None = None) -> Iterator[Publisher]:
    """Publish all bars shown inside, and how the run ended.

    Args:
        state: A run's folder ``.state``.
        stages, forecast: As in Publisher. A run within another, such as a variant's, makes no forecast.
    """
    global _publisher
    before, _publisher = _publisher, Publisher(state / PROGRESS, stages, None if _publisher else forecast)
    publisher = _publisher
    publisher.publish(at_once=True)
    try:
        yield publisher
    except KeyboardInterrupt:
        publisher.end("it was stopped")
        raise
    except BaseException as error:
        publisher.end(f"{type(error).__name__}: {error}"[:2000])
        raise
    else:
        publisher.end("done")
    finally:
        _publisher = before
