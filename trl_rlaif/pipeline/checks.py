"""Checks recipe references that only stages would otherwise read: judge prompts, reward functions, data columns."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.data import Loaded, Stream
from trl_rlaif.data.loading import place_of
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.pipeline.named_functions import load_function
from trl_rlaif.recipe import ComponentRef, Recipe, prompt_folder
from trl_rlaif.recipe.inputs import read_calibration, read_pairs, read_prompts
from trl_rlaif.remembered import remembered
from trl_rlaif.validation import Origin

if TYPE_CHECKING:
    from trl_rlaif.components import Labeler
    from trl_rlaif.plugins import Plugins

# Arguments that every reward function receives besides the data's columns.
_GIVEN = ("prompts", "completions", "completion_ids", "id", "category", "trainer_state")

_Data = dict[str, Callable[[], Loaded[Any] | Stream[Any]]]


@dataclass(frozen=True)
class _Asked:
    """A judge prompt: its key in the recipe, its name, the labeler that uses it, and the data it is used on.

    Args:
        data: By source of rows, a function that reads it.
    """

    key: tuple[str, ...]
    prompt: str
    labeler: ComponentRef
    data: _Data


def check_prompts(recipe: Recipe, plugins: Plugins) -> None:
    """Load every judge prompt, and let each labeler check that it has the parts that its options need.

    Raises:
        UserError: A template is wrong, a part is missing, a data row lacks a column that a template names, or the
        labeler does not allow the judge to be taught.
    """
    problems: list[Problem] = []
    for asked in _asked(recipe):
        try:
            prompt = JudgePrompt.load(prompt_folder(asked.prompt))
            found = plugins.registry.find("labeler", asked.labeler.name)
            labeler = plugins.registry.create("labeler", asked.labeler.name, asked.labeler.options)
            with Origin.of(found, asked.labeler.where).blamed("check_prompt()"):
                labeler.check_prompt(prompt)
            with Origin.of(found, asked.labeler.where).blamed("check_row()"):
                _check_rows(labeler, prompt, asked.data)
        except UserError as error:
            problems += [Problem(p.what, p.where or recipe.line(asked.key), p.fix) for p in error.problems]
    problems += _teaching_problems(recipe, plugins)
    if problems:
        raise UserError.from_problems(list(dict.fromkeys(problems)))


def _teaching_problems(recipe: Recipe, plugins: Plugins) -> Iterator[Problem]:
    """Problems of the labeler whose judge should be taught."""
    if recipe.judge is None:
        return
    ref, where = recipe.teaching_labeler, recipe.line(("label", "labeler"))
    labeler = plugins.registry.create("labeler", ref.name, ref.options)
    if not labeler.candidates:
        what = f"'judge' cannot teach the questions of the labeler '{ref.name}', which does not expose them."
        yield Problem(what, where, "Choose a labeler with candidates, such as distilled, or leave out 'judge'.")
    if ref.options.get("thinking"):
        what = f"'judge' teaches answers without a rationale, but '{ref.name}' lets the judge think first."
        yield Problem(what, where, "Set thinking: false, or leave out 'judge'.")


def _check_rows(labeler: Labeler, prompt: JudgePrompt, data: _Data) -> None:
    """Check that every row has the columns that a labeler reads; data on the Hub or in folders is left to the stage."""
    if not labeler.columns(prompt):
        return
    for source, read in data.items():
        for item in read().items if os.path.isfile(source) else ():
            try:
                labeler.check_row(prompt, item.extra)
            except UserError as error:
                where = place_of(source, item.id)
                raise UserError.from_problems([Problem(p.what, where, p.fix) for p in error.problems]) from None


def _asked(recipe: Recipe) -> Iterator[_Asked]:
    """All judge prompts of a recipe."""
    data, label, evaluate = recipe.data, recipe.label, recipe.evaluate
    prompts: _Data = {data.prompts: partial(read_prompts, recipe, data.prompts)} if data.prompts else {}
    if label:
        pairs: _Data = {data.pairs: partial(read_pairs, recipe)} if data.pairs else prompts
        judged: _Data = {label.calibration: partial(read_calibration, recipe)} if label.calibration else {}
        yield _Asked(("label", "prompt"), label.prompt, label.main_labeler, pairs | judged)
        for name, of in label.compare.items():
            key = ("label", "compare", name, "prompt")
            yield _Asked(key, of.prompt or label.prompt, of.labeler or label.main_labeler, pairs)
    if recipe.judge:
        key = ("judge" if recipe.judge.prompt else "label", "prompt")
        yield _Asked(key, recipe.teaching_prompt, recipe.teaching_labeler, {})
    for labeler in recipe.reward_labelers.values():
        yield _Asked(("rl", "rewards"), label.prompt if label else "general", labeler, prompts)
    if evaluate:
        sources = evaluate.sets.values() or [data.eval_prompts]
        held_out = {source: partial(read_prompts, recipe, source, "eval_prompts") for source in sources}
        labeler = recipe.deciding_labeler(evaluate.judge)
        yield _Asked(("evaluate", "prompt"), recipe.evaluation_prompt, labeler, held_out)
        for name, judge in evaluate.judges.items():
            key = ("evaluate", "judges", name, "prompt")
            labeler = recipe.deciding_labeler(judge.judge or evaluate.judge)
            yield _Asked(key, judge.prompt or recipe.evaluation_prompt, labeler, held_out)
        if evaluate.harmless:
            yield _Asked(("evaluate", "harmless"), evaluate.harmless, ComponentRef("direct"), held_out)


def check_sampler(recipe: Recipe, plugins: Plugins) -> None:
    """Create the pair sampler, which reads the files named in its options.

    Raises:
        UserError: A file or an option is wrong.
    """
    ref = recipe.sample.sampler if recipe.sample else None
    if ref is not None:
        with Origin.of(plugins.registry.find("pair_sampler", ref.name), ref.where).blamed("__init__()"):
            plugins.registry.create("pair_sampler", ref.name, ref.options)


def check_ranking(recipe: Recipe, plugins: Plugins) -> None:
    """Check that a tournament can ask the labeler about one order at a time, and that ranking rewards receive groups.

    Raises:
        UserError: The labeler has no option ``orders``; or with ranking rewards, the algorithm scores each response
        alone or there are selectors.
    """
    for name, labeler in recipe.reward_labelers.items():
        if getattr(plugins.registry.find("labeler", name).component, "ranks", False):
            _check_groups(recipe, name, labeler.where)
    ranking = recipe.label.ranking if recipe.label else None
    if ranking and ranking.method == "tournament" and "orders" not in recipe.label.labeler.options:
        raise UserError(
            f"A tournament asks about one order at a time, and the labeler '{recipe.label.labeler.name}' has no option "
            "'orders'.",
            where=recipe.line(("label", "ranking")),
            fix="Set label.labeler to distilled, or label.ranking.method to all_pairs.",
        )


def _check_groups(recipe: Recipe, name: str, where: str) -> None:
    """A reward that compares the responses to a prompt must receive all of them together."""
    if not ALGORITHMS[recipe.rl.algorithm].groups:
        raise UserError(
            f"The reward '{name}' compares the responses to a prompt, and {recipe.rl.algorithm} scores each alone.",
            where=where,
            fix="Set rl.algorithm to grpo or rloo.",
        )
    if recipe.rl.selectors:
        raise UserError(
            f"The reward '{name}' compares the responses to a prompt, which the pool of rl.selectors scores in parts.",
            where=recipe.line(("rl", "selectors")),
            fix="Leave out the selectors, or use another reward.",
        )


def check_trainers(recipe: Recipe, plugins: Plugins) -> None:
    """Run ``try_settings`` and ``check_base``, unless the same sections passed on this machine before.

    They import torch, transformers and TRL, which takes seconds. Only passes are remembered, until a package changes;
    a run checks both again.

    Raises:
        UserError: As in those two.
    """
    from trl_rlaif.models.loading import resolved

    def tried() -> bool | None:
        from trl_rlaif.pipeline.trial import try_settings
        from trl_rlaif.recipe.base_model import check_base

        for each in recipe.variants.values() or [recipe]:
            try_settings(each, plugins)
        return check_base(recipe) or None

    sections = {name: section for name, section in recipe.to_dict().items() if name not in ("data", "report")}
    base = resolved(recipe.model.path)
    config = Path(base or "", "config.json")
    written = config.read_text(encoding="utf-8") if config.is_file() else base
    machine = [sorted(map(str, Path("/dev").glob("nvidia*"))), os.environ.get("CUDA_VISIBLE_DEVICES")]
    remembered(["trainers", sections, written, machine], tried)


def check_functions(recipe: Recipe) -> None:
    """Import every reward function, and check its signature against its call and the prompts' columns.

    Raises:
        UserError, ComponentError: It cannot be imported, does not accept an argument of its call, or a prompt lacks a
            required column.
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
    if source is None or not os.path.isfile(source) or (takes_all and not needed):  # no Hub or folder, as in check_data
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
        what = f"The reward function '{name}' has no parameter '{refused[0]}', which it is called with."
        raise UserError(what, where=where, fix=f"Write: def {name}(prompts, completions, **columns).")
