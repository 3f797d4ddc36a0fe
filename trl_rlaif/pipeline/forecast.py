"""How long a run will take, from how long its first minute took: by the tokens that each stage computes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from trl_rlaif.pipeline.stage import Amounts, Stage
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.inputs import read_pairs, read_prompts

# Characters of a token, roughly, and the tokens that a chat template adds to a prompt.
_CHARACTERS, _TEMPLATE = 4, 25


def shares(recipe: Recipe, stages: Iterable[Stage]) -> dict[str, float]:
    """What each of these stages is of all that they compute, by name; 0 where a stage cannot tell."""
    amounts = amounts_of(recipe)
    costs = {stage.name: stage.cost(recipe, amounts) for stage in stages}
    whole = sum(costs.values())
    return {name: cost / whole for name, cost in costs.items()} if whole else {}


def amounts_of(recipe: Recipe) -> Amounts:
    """How much there is to do, as far as the data says."""
    data = recipe.data
    prompts = read_prompts(recipe, data.prompts).items if data.prompts else []
    pairs = len(read_pairs(recipe).items) if data.pairs else len(prompts)
    sources = [*recipe.evaluate.sets.values()] if recipe.evaluate else []
    if recipe.evaluate and not sources and data.eval_prompts:
        sources = [data.eval_prompts]
    held_out = sum(len(read_prompts(recipe, source, "eval_prompts").items) for source in sources)
    lengths = [len(str(prompt.prompt)) / _CHARACTERS + _TEMPLATE for prompt in prompts[:1000]]
    return Amounts(len(prompts), pairs, held_out, statistics.fmean(lengths) if lengths else 100.0)
