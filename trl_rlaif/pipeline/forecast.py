"""Forecasts a run's duration from its first minute (at least 1%) and the tokens that each stage computes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from trl_rlaif.distributed import is_first
from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.stage import Amounts, Stage
from trl_rlaif.progress import Forecast
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.inputs import SMALL_FILE, read_pairs, read_prompts

# Approximate characters per token, and the tokens that a chat template adds to a prompt.
_CHARACTERS, _TEMPLATE = 4, 25


def forecast(recipe: Recipe, stages: Sequence[Stage]) -> Forecast | None:
    """Each stage's fraction of the compute of these stages; None if it is unknown, and in all but the first process."""
    amounts = _amounts(recipe) if is_first() else None
    if amounts is None:
        return None
    costs = {stage.name: stage.cost(recipe, amounts) for stage in stages}
    known = {name: cost for name, cost in costs.items() if cost}
    whole = sum(known.values())
    unknown = tuple(name for name, cost in costs.items() if cost is None)
    measured = {stage.name for stage in stages if stage.one_bar}
    return Forecast({name: cost / whole for name, cost in known.items()}, unknown, measured) if known else None


def _amounts(recipe: Recipe) -> Amounts | None:
    """The amount of work, from files that are quick to read; None for others, whose errors the stages report."""
    data = recipe.data
    held_out = [*recipe.evaluate.sets.values()] if recipe.evaluate else []
    if recipe.evaluate and not held_out and data.eval_prompts:
        held_out = [data.eval_prompts]
    sources = [source for source in (data.prompts, data.pairs, *held_out) if source]
    if not all(Path(source).is_file() and Path(source).stat().st_size <= SMALL_FILE for source in sources):
        return None
    try:
        prompts = read_prompts(recipe, data.prompts).items if data.prompts else []
        each = recipe.sample.pairs_a_prompt if recipe.sample else 1
        pairs = sum(1 for _ in read_pairs(recipe).items) if data.pairs else len(prompts) * each
        asked = sum(len(read_prompts(recipe, source, "eval_prompts").items) for source in held_out)
    except UserError:
        return None
    lengths = [len(str(prompt.prompt)) / _CHARACTERS + _TEMPLATE for prompt in prompts[:1000]]
    return Amounts(len(prompts), pairs, asked, statistics.fmean(lengths) if lengths else 100.0)
