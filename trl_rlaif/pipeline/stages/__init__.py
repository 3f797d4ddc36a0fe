"""The stages of a run, in order, one module each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trl_rlaif import distributed
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.models import sharding
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
# In a run with rounds: the stages that run once, after the last round, and those of a round.
ENDS = ("evaluate", "report")
ROUND = tuple(name for name in STAGES if name not in ENDS)


def active_stages(recipe: Recipe) -> dict[str, Stage]:
    """The stages that a recipe includes, in order, by name."""
    return {name: stage for name, stage in STAGES.items() if stage.is_active(recipe)}


def check_processes(recipe: Recipe, only: Sequence[str]) -> None:
    """Reject, before any computation, what several processes do not support: a batch that does not divide, and with
    FSDP settings that do not work with sharded weights.

    Args:
        recipe: The recipe; its variants, if any, are checked instead.
        only: The requested stages; empty for all.

    Raises:
        UserError: With every stage whose batch does not divide, and every unsupported setting.
    """
    if distributed.processes() == 1:
        return
    from trl_rlaif.memory.settings import setting

    asked = {name.rpartition("/")[2] for name in only} or set(STAGES)  # in a run with rounds: 2/rl
    problems: defaultdict[str, list[Problem]] = defaultdict(list, {"": list(sharding.problems())})
    for each in recipe.variants.values() or [recipe]:
        for name in (name for name, stage in active_stages(each).items() if stage.trains and name in asked):
            try:
                distributed.share_of_batch(*(setting(each, name, key) for key in BATCH))
            except UserError as error:
                where = each.line((name,))
                problems[where] = [replace(problem, where=where) for problem in error.problems]
        if each.rl and "rl" in asked and sharding.requested():
            problems[each.line(("rl",))] += _not_shared_out(each)
    if any(problems.values()):
        raise UserError.from_problems([problem for found in problems.values() for problem in found])


def _not_shared_out(recipe: Recipe) -> Iterator[Problem]:
    """Settings of the section rl that FSDP does not support."""
    asked = {
        ("rl", "algorithm"): recipe.rl.algorithm == "rejection_sampling",
        ("rl", "generation"): recipe.rl.config.get("generation") == "vllm",
        ("rl", "use_vllm"): recipe.rl.config.get("use_vllm"),
    }
    for key, is_asked in asked.items():
        if is_asked:
            what = "Rejection sampling" if key[1] == "algorithm" else "Generation by vLLM"
            yield Problem(f"{what} does not run with FSDP.", recipe.line(key), "Start it with DDP.")
