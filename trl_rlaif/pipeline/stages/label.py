"""The stage label: a judge's soft labels, and the resulting preferences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import data_file, prompt_file
from trl_rlaif.pipeline.stage import QUESTION, Amounts, Stage, previous, skipped

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.results import LabelResults
    from trl_rlaif.recipe import Recipe


class Label(Stage):
    """Preferences with p, the probability that the chosen response is the better one."""

    name = "label"
    # labels.jsonl stays: a line is looked up by the inputs that determine it (labels/store.py).
    outputs = (artifacts.PREFERENCES, artifacts.RANKINGS, artifacts.JURY)
    companions = (artifacts.LABELS,)
    without = ("label.batch_tokens", "label.precision", "label.budget")
    prepares = True

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.label
        prompts = {"label.prompt": section.prompt}
        prompts |= {f"label.compare.{name}.prompt": other.prompt for name, other in section.compare.items()}
        found: dict[str, dict[str, str] | None] = {key: prompt_file(name) for key, name in prompts.items() if name}
        return found | {"label.calibration": data_file(section.calibration) if section.calibration else None}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("calibration",) if recipe.label.calibration else ()

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        return ("sample", "judge", previous("judge")) if recipe.asks_taught("label") else ("sample",)

    def summary(self, numbers: LabelResults) -> str:
        bias, ranking = numbers["position_bias"], numbers.get("ranking")
        return (
            f"{numbers['labeled']} of {numbers['pairs']} pairs"
            + skipped(numbers)
            + (f", {numbers['made']} of them new" if not ranking and numbers["made"] < numbers["labeled"] else "")
            + (f", {ranking['questions']} of {ranking['all_questions']} questions asked" if ranking else "")
            + (f", {numbers['voted']} of them from votes" if numbers.get("voted") else "")
            + (f", by a jury of {len(numbers['jury']['members'])}" if "jury" in numbers else "")
            + (f", position bias {bias['rate']:.0%}" if bias else "")
            + (f", {numbers['agreement']['rate']:.0%} as people chose" if numbers["agreement"] else "")
        )

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        response = recipe.sample.max_new_tokens if recipe.sample else amounts.tokens
        if not isinstance(recipe.label.judge, str) or recipe.label.compare or recipe.label.calibration:
            return None
        if recipe.label.ranking and recipe.label.ranking.method == "tournament":  # one progress bar per round
            return None
        # In both orders; their shared prefix is computed once.
        return amounts.pairs * (amounts.tokens + QUESTION + 4 * response)

    def memory(self, run: MemoryRun) -> list[Part]:
        from trl_rlaif.memory.parts import judging

        return [*judging(run, run.recipe.label.judge, alone=True)]
