"""The stage sample: pairs of responses, sampled from the initial policy or read from the recipe's data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import data_file
from trl_rlaif.pipeline.stage import BASE, DRAWN, GROUPING, READING, Amounts, Stage, previous

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.results import SampleResults
    from trl_rlaif.recipe import Recipe

# Responses in a sampler's conversation, for planning memory: a response, a critique and a revision.
_TURNS = 3


class Sample(Stage):
    """Pairs; those from the data replace the recipe's section."""

    name = "sample"
    outputs = (artifacts.PAIRS, artifacts.REVISIONS, artifacts.PARTIAL_PAIRS)
    prepares = True

    def is_active(self, recipe: Recipe) -> bool:
        return recipe.sample is not None or bool(recipe.data.pairs)

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        if recipe.data.pairs:
            return ("run.seed", "model.path", "data.format", "data.scored_pairs", "data.category")
        return (*BASE, *READING, *GROUPING, "data.max_prompts", "sample")

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        key = "pairs" if recipe.data.pairs else "prompts"
        paths = {f"data.{key}": getattr(recipe.data, key)}
        if recipe.sample and (sampler := recipe.sample.sampler):
            paths |= {f"sample.sampler.{sampler.name}.{option}": sampler.options[option] for option in sampler.files}
        return {name: data_file(path) for name, path in paths.items()}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("pairs" if recipe.data.pairs else "prompts",)

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return () if recipe.data.pairs else ("sft", previous("rl"))

    def summary(self, numbers: SampleResults) -> str:
        dropped = ", ".join(f"{n} {reason}" for reason, n in numbers["dropped"].items())
        ties = f", {numbers['ties']} of them ties" if numbers.get("ties") else ""
        revisions = f", {numbers['revisions']} revisions" if numbers.get("revisions") else ""
        return f"{numbers['pairs']} pairs{ties}{revisions}" + (f" (dropped: {dropped})" if dropped else "")

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        section = recipe.sample
        if section is None:
            return 0.0
        if section.sampler is not None:
            return None
        return amounts.prompts * (amounts.tokens + DRAWN * section.num_responses * section.max_new_tokens)

    def memory(self, run: MemoryRun) -> list[Part]:
        from trl_rlaif.memory.parts import frozen_adapters, generation

        section = run.recipe.sample
        if section is None:
            return []
        response = run.within(section.max_new_tokens)
        start = [frozen_adapters(run, "adapter of the start", 1)] if run.recipe.sft or run.recipe.rounds else []
        activations, prompt = run.generating(adapters=bool(start)), run.prompt
        if section.sampler is not None:
            run.notes.append(
                f"The sampler '{section.sampler.name}' is taken to draw {_TURNS} responses in a conversation."
            )
            prompt = run.within(run.prompt + (_TURNS - 1) * response)
        return [*run.base(), *start, *generation(activations, section.batch_size, prompt, response)]
