"""What labeling takes: seconds, the judge's precision, and the tokens of a server, against a budget.

All is kept on disk until the stage is complete, so that a run that was stopped goes on counting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.files import read_state, write_state
from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.usage import Budget, Meter, Price, Usage
from trl_rlaif.pipeline import artifacts
from trl_rlaif.recipe import ServerJudgeSection

if TYPE_CHECKING:
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.labels.store import Plan
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.label_tasks import LabelTask

# What a pass took so far is kept on disk this often; a kill loses as much.
NOTE_SECONDS = 1.0


def usage(context: Context) -> Usage:
    """What the servers of all judges have counted since the stage was begun."""
    return Usage(**read_state(_path(context), "Without it the budget of label counts from zero again."))


def write_usage(context: Context, used: Usage) -> None:
    """Keep it until the stage is complete."""
    _path(context).parent.mkdir(exist_ok=True)
    write_state(_path(context), asdict(used))


def _path(context: Context) -> Path:
    return context.folder.state / artifacts.work_of("label") / artifacts.USAGE


def usage_numbers(context: Context) -> dict[str, Any] | None:
    """The same as results.json has it; None where no server was asked."""
    used = usage(context)
    if used == Usage():
        return None
    section = context.recipe.label
    priced = any(isinstance(judge, ServerJudgeSection) and judge.price for judge in section.judges)
    return asdict(used) | {"cost": used.cost if priced else None}


@contextmanager
def counting(context: Context, task: LabelTask, plan: Plan, judge: Judge) -> Iterator[Callable[[], None]]:
    """Yields what notes, once a second, what a pass took so far."""
    meter = meter_of(context, task)
    if isinstance(judge, RemoteJudge) and meter is not None:
        judge.meter = meter
    before, started, noted = plan.noted.get("seconds", 0.0), time.monotonic(), -math.inf

    def note(*, at_once: bool = False) -> None:
        nonlocal noted
        now, probe = time.monotonic(), getattr(judge, "probe", None)
        if at_once or now - noted >= NOTE_SECONDS:
            noted = now
            plan.note(seconds=before + now - started, **({"precision": asdict(probe)} if probe else {}))
            if meter is not None and meter.used != Usage():
                write_usage(context, meter.used)

    try:
        yield note
    finally:
        note(at_once=True)


def meter_of(context: Context, task: LabelTask) -> Meter | None:
    """What counts a server's tokens from now on, with the budget of the stage; None for a judge on none."""
    if not isinstance(task.judge, ServerJudgeSection):
        return None
    budget, price = context.recipe.label.budget, task.judge.price
    return Meter(
        Price(**price.model_dump()) if price else Price(),
        Budget(**budget.model_dump()) if budget else Budget(),
        usage(context),
    )
