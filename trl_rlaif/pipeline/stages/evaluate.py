"""The stage evaluate: the trained policy against the initial policy on held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.inputs import data_file, prompt_file
from trl_rlaif.pipeline.stage import BASE, DRAWN, GROUPING, QUESTION, READING, TRACKING, Amounts, Stage, previous
from trl_rlaif.recipe import JudgeSection

if TYPE_CHECKING:
    from trl_rlaif.memory.parts import MemoryRun
    from trl_rlaif.memory.plan import Part
    from trl_rlaif.pipeline.results import EvaluateResults
    from trl_rlaif.recipe import Recipe


class Evaluate(Stage):
    """Responses of both policies, the judges' verdicts on them, and the rewards of ``rl``."""

    name = "evaluate"
    outputs = (artifacts.SAMPLES,)
    without = TRACKING
    one_bar = False

    def settings(self, recipe: Recipe) -> tuple[str, ...]:
        keys = (*BASE, *READING, *GROUPING, "evaluate")
        if recipe.evaluate.max_new_tokens is None and "response_length" not in recipe.rl.config:
            keys += ("sample.max_new_tokens",)
        return keys

    def files(self, recipe: Recipe) -> dict[str, dict[str, str] | None]:
        section = recipe.evaluate
        prompts = {"evaluate.prompt": recipe.evaluation_prompt, "evaluate.harmless": section.harmless}
        prompts |= {f"evaluate.judges.{name}.prompt": judge.prompt for name, judge in section.judges.items()}
        sets = {f"evaluate.sets.{name}": source for name, source in section.sets.items()}
        sets = sets or {"data.eval_prompts": recipe.data.eval_prompts}
        found = {key: prompt_file(name) for key, name in prompts.items() if name}
        return found | {key: data_file(source) for key, source in sets.items()}

    def columns(self, recipe: Recipe) -> tuple[str, ...]:
        return ("eval_prompts",)

    def after(self, recipe: Recipe) -> tuple[str, ...]:
        taught = ("judge", previous("judge")) if recipe.asks_taught("evaluate") else ()
        return ("sft", "rl", *taught, *(("reward",) if "reward" in recipe.rl.reward_names else ()))

    def summary(self, numbers: EvaluateResults) -> str:
        return "; ".join(
            f"{name}: wins {s['win_rate']:.0%} ({s['interval'][0]:.0%} to {s['interval'][1]:.0%}){_agreeing(s)}"
            for name, s in numbers["sets"].items()
            if "win_rate" in s
        )

    def cost(self, recipe: Recipe, amounts: Amounts) -> float | None:
        """Responses of both policies, their rewards and NLLs, and the judge's questions; a rubric counts as one."""
        if not isinstance(recipe.evaluate.judge, str) or recipe.evaluate.judges or recipe.evaluate.harmless:
            return None
        responses, response = recipe.evaluate.num_responses, longest_response(recipe)
        drawn = amounts.tokens + DRAWN * responses * response
        scored = (responses + 1) * (amounts.tokens + response)
        asked = len(recipe.reward_labelers) * (amounts.tokens + response + QUESTION)
        return amounts.held_out * (2 * (drawn + scored + asked) + amounts.tokens + 4 * response)

    def memory(self, run: MemoryRun) -> list[Part]:
        """Responses of the trained and the initial policy, rewards, and the judge, on one base."""
        from trl_rlaif.memory.parts import JUDGE_TOKENS, frozen_adapters, generation, judge_pass

        recipe, section = run.recipe, run.recipe.evaluate
        adapters = 1 + (recipe.sft is not None) + ("reward" in recipe.rl.reward_names)
        response = longest_response(recipe)
        if isinstance(section.judge, JudgeSection):
            run.notes.append("The judge of 'evaluate' is a model of its own, and is not counted.")
        own = [name for name, further in section.judges.items() if isinstance(further.judge, JudgeSection)]
        if own:
            run.notes.append(f"Models of their own among evaluate.judges ({', '.join(own)}) are not counted.")
        rows = max(1, section.batch_size // section.num_responses) * section.num_responses
        activations = run.activations(None)
        return [
            *run.base(),
            frozen_adapters(run, f"{adapters} adapters (frozen)", adapters),
            *generation(run.generating(adapters=True), rows, run.prompt, response),
            judge_pass("reward model or judge", activations, JUDGE_TOKENS),
        ]


def longest_response(recipe: Recipe) -> int:
    """Maximum response length in tokens."""
    given = recipe.evaluate.max_new_tokens or recipe.rl.config.get("response_length")
    return given or (recipe.sample.max_new_tokens if recipe.sample else 128)


def _agreeing(numbers: dict[str, Any]) -> str:
    """How often all judges of a set agree; empty for a single judge."""
    among = (numbers.get("judge_agreement") or {}).get("all")
    return f", judges agree in {among['rate']:.0%}" if among else ""
