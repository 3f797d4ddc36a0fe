"""The stages of a run, in order; a module says what each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_rlaif import distributed
from trl_rlaif.errors import UserError
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
    """Refuse what several processes would do over and over instead of sharing it.

    Args:
        only: The stages that were asked for; all where there are none.

    Raises:
        UserError: There are several processes, and one of the stages does not share its work. (Labeling is shared
            out otherwise, by ``--shard``.)
    """
    processes, active = distributed.processes(), active_stages(recipe)
    asked = [STAGES.get(name.rpartition("/")[2]) for name in only]  # of a run in rounds: 2/rl
    if processes == 1 or (only and all(stage is not None and stage.shared for stage in asked)):
        return
    together = ",".join(name for name, stage in STAGES.items() if stage.shared)
    before = [name for name, stage in active.items() if stage.prepares]
    first = f"Run --only {','.join(before)} with one process, then" if before else "Run"
    raise UserError(
        f"{processes} processes share the stage {together} alone.",
        fix=f"{first} --only {together} with several, and --resume with one for what comes behind it.",
    )
