"""The stages of a run, in order; a module says what each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trl_rlaif import distributed
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.pipeline.inputs import BATCH
from trl_rlaif.pipeline.stages.evaluate import Evaluate
from trl_rlaif.pipeline.stages.judge import Judge
from trl_rlaif.pipeline.stages.label import Label
from trl_rlaif.pipeline.stages.report import Report
from trl_rlaif.pipeline.stages.reward import Reward
from trl_rlaif.pipeline.stages.rl import Rl
from trl_rlaif.pipeline.stages.sample import Sample
from trl_rlaif.pipeline.stages.sft import Sft

if TYPE_CHECKING:
    from trl_rlaif.pipeline.stage import Stage
    from trl_rlaif.recipe import Recipe

_IN_ORDER: tuple[Stage, ...] = (Sft(), Sample(), Judge(), Label(), Reward(), Rl(), Evaluate(), Report())
STAGES = {stage.name: stage for stage in _IN_ORDER}
# Of a run in rounds, what comes once, after the last of them, and what a round consists of.
ENDS = ("evaluate", "report")
ROUND = tuple(name for name in STAGES if name not in ENDS)


def active_stages(recipe: Recipe) -> dict[str, Stage]:
    """The stages that a recipe runs, in order, by name."""
    return {name: stage for name, stage in STAGES.items() if stage.is_active(recipe)}


def check_processes(recipe: Recipe, only: Sequence[str]) -> None:
    """Refuse a batch that does not divide among the processes, before anything is computed.

    Args:
        recipe: Or its variants, if it has some.
        only: The stages that were asked for; all where there are none.

    Raises:
        UserError: Every stage whose batch does not.
    """
    if distributed.processes() == 1:
        return
    from trl_rlaif.memory.settings import setting

    asked = {name.rpartition("/")[2] for name in only} or set(STAGES)  # of a run in rounds: 2/rl
    problems: dict[str, list[Problem]] = {}
    for each in recipe.variants.values() or [recipe]:
        for name in (name for name, stage in active_stages(each).items() if stage.trains and name in asked):
            try:
                distributed.share_of_batch(*(setting(each, name, key) for key in BATCH))
            except UserError as error:
                where = each.line((name,))
                problems[where] = [replace(problem, where=where) for problem in error.problems]
    if problems:
        raise UserError.from_problems([problem for found in problems.values() for problem in found])
