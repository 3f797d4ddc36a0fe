"""The cost of labeling: seconds, the judge's precision, and a server's tokens, within a budget.

Seconds and precision are kept on disk until the stage is complete, like the tokens in pipeline/usage.py.
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

# Interval at which a pass's cost so far is written to disk; a kill loses at most this much.
NOTE_SECONDS = 1.0


@contextmanager
def counting(context: Context, task: LabelTask, plan: Plan, judge: Judge) -> Iterator[Callable[[], None]]:
    """Yields a function that records the cost of a pass so far, at most once per ``NOTE_SECONDS``."""
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
    """A new meter of a server's tokens, with the stage's budget; None if the judge is not on a server."""
    if not isinstance(task.judge, ServerJudgeSection):
        return None
    budget = context.recipe.label.budget
    return Meter(price_of(task.judge), Budget(**budget.model_dump()) if budget else Budget(), context.total)
