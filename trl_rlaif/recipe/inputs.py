"""The data of a recipe, read as its stages read it: by them, and all of it at once before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from trl_rlaif.data import Loaded, Pair, Prompt, load_finetuning, load_pairs, load_prompts, load_rows
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.recipe.parsing import Recipe


def read_prompts(recipe: Recipe, source: str, key: str = "prompts") -> Loaded[Prompt]:
    """Prompts of a file, folder or Hub id; ``key`` says whose columns it has, ``prompts`` or ``eval_prompts``."""
    return load_prompts(source, category=recipe.data.category, columns=recipe.data.columns_of(key))


def read_pairs(recipe: Recipe) -> Loaded[Pair]:
    """The pairs of ``data.pairs``."""
    data = recipe.data
    return load_pairs(
        data.pairs,
        format=data.format,
        category=data.category,
        seed=recipe.run.seed,
        columns=data.columns_of("pairs"),
        scored=data.scored_pairs,
    )


def read_calibration(recipe: Recipe) -> Loaded[Pair]:
    """The pairs of ``label.calibration``."""
    columns, scored = recipe.data.columns_of("calibration"), recipe.data.scored_pairs
    return load_pairs(recipe.label.calibration, seed=recipe.run.seed, columns=columns, scored=scored)


def read_finetuning(recipe: Recipe, chat: bool = True) -> list[dict[str, Any]]:
    """The rows of ``sft.data``, for a model with a chat template or without."""
    return load_finetuning(recipe.sft.data, names=recipe.data.columns_of("sft"), chat=chat)


def read_rehearsal(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of ``rl.rehearsal``.

    Raises:
        UserError: One lacks its prompt or its completion.
    """
    source = recipe.rl.rehearsal
    rows = load_rows(source, columns=recipe.data.columns_of("rehearsal"), read=("prompt", "completion"))
    lacking = [i for i, row in enumerate(rows, 1) if not row.get("prompt") or not row.get("completion")]
    if lacking:
        what = f"{len(lacking)} rows to rehearse lack 'prompt' or 'completion'; the first is row {lacking[0]}."
        raise UserError(what, where=source)
    return rows


def check_data(recipe: Recipe) -> None:
    """Read all files that a recipe's stages will read. What lies in folders and on the Hub waits for its stage.

    Raises:
        UserError: With every problem of every file, where it would otherwise end a run that has computed for hours.
    """
    problems: list[Problem] = []
    for source, read in _sources(recipe):
        if os.path.isfile(source):
            try:
                read()
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError.from_problems(list(dict.fromkeys(problems)))


def _sources(recipe: Recipe) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each source of data that the stages read, with how they do."""
    data, rl, evaluate = recipe.data, recipe.rl, recipe.evaluate
    if recipe.sft:
        yield recipe.sft.data, partial(read_finetuning, recipe)
    if data.prompts and (recipe.sample or (rl and rl.algorithm != "dpo")):
        yield data.prompts, partial(read_prompts, recipe, data.prompts)
    if data.pairs:
        yield data.pairs, partial(read_pairs, recipe)
    if recipe.label and recipe.label.calibration:
        yield recipe.label.calibration, partial(read_calibration, recipe)
    if rl and rl.rehearsal:
        yield rl.rehearsal, partial(read_rehearsal, recipe)
    sets = [*evaluate.sets.values()] or [data.eval_prompts] if evaluate else []
    for source in filter(None, sets):
        yield source, partial(read_prompts, recipe, source, "eval_prompts")
