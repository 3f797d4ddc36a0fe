"""What labeling takes: seconds, the judge's precision, and the tokens of a server, against a budget.

Seconds and precision are kept on disk until the stage is complete, as pipeline/usage.py keeps the tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from trl_rlaif.judging.remote import RemoteJudge
from trl_rlaif.judging.usage import Budget, Meter
from trl_rlaif.pipeline.judges import price_of
from trl_rlaif.recipe import ServerJudgeSection

if TYPE_CHECKING:
    from trl_rlaif.judging.judge import Judge
    from trl_rlaif.labels.store import Plan
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.label_tasks import LabelTask

# What a pass took so far is kept on disk this often; a kill loses as much.
NOTE_SECONDS = 1.0


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

    try:
        yield note
    finally:
        note(at_once=True)


def meter_of(context: Context, task: LabelTask) -> Meter | None:
    """What counts a server's tokens from now on, with the budget of the stage; None for a judge on none."""
    if not isinstance(task.judge, ServerJudgeSection):
        return None
    budget = context.recipe.label.budget
    return Meter(price_of(task.judge), Budget(**budget.model_dump()) if budget else Budget(), context.total)
