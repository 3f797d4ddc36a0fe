"""What a recipe names and only its stages would look into: judges' prompts, reward functions and their columns."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trl_rlaif.data.loading import place_of
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.pipeline.rl_setup import load_function
from trl_rlaif.recipe import ComponentRef, Recipe, prompt_folder
from trl_rlaif.recipe.inputs import read_prompts
from trl_rlaif.validation import Origin

if TYPE_CHECKING:
    from trl_rlaif.plugins import Plugins

# What every reward function is given besides the columns of the data.
_GIVEN = ("prompts", "completions", "completion_ids", "id", "category", "trainer_state")


def check_prompts(recipe: Recipe, plugins: Plugins) -> None:
    """Read every judge's prompt, and have each labeler look whether it holds what its options need.

    Raises:
        UserError: A template is wrong or names what it is not given, or a part is missing.
    """
    problems: list[Problem] = []
    for key, name, labeler in _prompts(recipe):
        try:
            prompt = JudgePrompt.load(prompt_folder(name))
            if labeler is not None:
                found = plugins.registry.find("labeler", labeler.name)
                with Origin.of(found, labeler.where).blamed("check_prompt()"):
                    plugins.registry.create("labeler", labeler.name, labeler.options).check_prompt(prompt)
        except UserError as error:
            problems += [Problem(p.what, p.where or recipe.line(key), p.fix) for p in error.problems]
    problems += _teaching_problems(recipe, plugins)
    if problems:
        raise UserError.from_problems(list(dict.fromkeys(problems)))


def _teaching_problems(recipe: Recipe, plugins: Plugins) -> Iterator[Problem]:
    """What a labeler lacks whose judge shall be taught."""
    if recipe.judge is None:
        return
    ref, where = recipe.teaching_labeler, recipe.line(("label", "labeler"))
    labeler = plugins.registry.create("labeler", ref.name, ref.options)
    if not labeler.candidates:
        what = f"'judge' cannot teach the questions of the labeler '{ref.name}': it does not say what they are."
        yield Problem(what, where, "Choose a labeler with candidates, such as distilled, or leave out 'judge'.")
    if ref.options.get("thinking"):
        what = f"'judge' teaches answers without a rationale, and '{ref.name}' has the judge think first."
        yield Problem(what, where, "Set thinking: false, or leave out 'judge'.")


def _prompts(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, ComponentRef | None]]:
    """Each prompt that a judge is asked with: its key, its name, and the labeler that asks, unless it is the usual."""
    label, evaluate = recipe.label, recipe.evaluate
    if label:
        yield ("label", "prompt"), label.prompt, label.labeler
        for name, of in label.compare.items():
            yield ("label", "compare", name, "prompt"), of.prompt or label.prompt, of.labeler or label.labeler
    if recipe.judge:
        key = "judge" if recipe.judge.prompt else "label"
        yield (key, "prompt"), recipe.teaching_prompt, recipe.teaching_labeler
    if recipe.rl and "direct" in recipe.rl.reward_names:
        options = label.labeler.options if label and label.labeler.name == "direct" else {}
        prompt = label.prompt if label else "general"
        yield ("rl", "rewards"), prompt, ComponentRef("direct", options, recipe.line(("rl", "rewards")))
    if evaluate:
        yield ("evaluate", "prompt"), recipe.evaluation_prompt, None
        for name, judge in evaluate.judges.items():
            yield ("evaluate", "judges", name, "prompt"), judge.prompt or recipe.evaluation_prompt, None
        if evaluate.harmless:
            yield ("evaluate", "harmless"), evaluate.harmless, None


def check_ranking(recipe: Recipe) -> None:
    """See that a tournament can ask the labeler about one order at a time.

    Raises:
        UserError: It has no option for that.
    """
    ranking = recipe.label.ranking if recipe.label else None
    if ranking and ranking.method == "tournament" and "orders" not in recipe.label.labeler.options:
        raise UserError(
            f"A tournament asks about one order at a time, and the labeler '{recipe.label.labeler.name}' has no option "
            "'orders'.",
            where=recipe.line(("label", "ranking")),
            fix="Set label.labeler to distilled, or label.ranking.method to all_pairs.",
        )


def check_functions(recipe: Recipe) -> None:
    """Import every reward function, and see that the prompts have the columns that it must be given.

    Raises:
        UserError, ComponentError: It cannot be imported, does not take what it is called with, or a prompt lacks a
            column.
    """
    for position, name in enumerate(recipe.rl.reward_names if recipe.rl else ()):
        if ":" in name:
            where = recipe.line(("rl", "rewards", position))
            with Origin(f"reward '{name}'", where).blamed("its import"):
                function = load_function(name)
            _check_signature(recipe, function, name.rpartition(":")[2], where)


def _check_signature(recipe: Recipe, function: Callable[..., Any], name: str, where: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = [p.name for p in by_name.values() if p.default is p.empty and p.name not in _GIVEN]
    source = recipe.data.prompts
    if source is None or not os.path.isfile(source) or (takes_all and not needed):  # as check_data: no Hub, no folder
        return
    prompts = read_prompts(recipe, source).items
    for column in needed:
        lacking = [prompt for prompt in prompts if column not in prompt.extra]
        if lacking:
            raise UserError(
                f"There is no column '{column}', which the reward function '{name}' must be given.",
                where=place_of(source, lacking[0].id),
                fix=f"Give every prompt the column, or the function a default: {column}=None.",
            )
    given = (*_GIVEN, *set.intersection(*(set(prompt.extra) for prompt in prompts)))
    refused = [column for column in given if not takes_all and column not in by_name]
    if refused:
        what = f"The reward function '{name}' does not take '{refused[0]}', with which it is called."
        raise UserError(what, where=where, fix=f"Write: def {name}(prompts, completions, **columns).")
