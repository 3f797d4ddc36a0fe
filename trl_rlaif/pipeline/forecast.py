"""How long a run will take, from how long its first minute took: by the tokens that each stage computes."""

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

# Characters of a token, roughly, and the tokens that a chat template adds to a prompt.
_CHARACTERS, _TEMPLATE = 4, 25


def forecast(recipe: Recipe, stages: Sequence[Stage]) -> Forecast | None:
    """What each of these stages is of all that they compute; None where the data does not say how much there is."""
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
    """How much there is to do, by files that are quickly read; a stage that cannot read its own says so itself."""
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
