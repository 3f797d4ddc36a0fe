"""Reads a recipe's data: for each stage, and all of it before a run to check it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.data import Loaded, Pair, Prompt, Stream, load_finetuning, load_pairs, load_prompts, stream_pairs
from trl_rlaif.data.finetuning import assistant_turns
from trl_rlaif.data.overlap import finetuned_prompts, question_key
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.progress import say
from trl_rlaif.recipe.parsing import Recipe
from trl_rlaif.types import Message

# Maximum size in bytes of a data file that is read again before a run to find prompts shared with others.
SMALL_FILE = 16 << 20
# Keys of held-out data.
_EVALUATED = ("evaluate.sets.", "data.eval_prompts")
_CALIBRATION = "label.calibration"


def read_prompts(recipe: Recipe, source: str, key: str = "prompts") -> Loaded[Prompt]:
    """Prompts of a file, folder or Hub id, with the columns configured for ``key``: ``prompts`` or ``eval_prompts``.

    For ``prompts``, only the first ``data.max_prompts``. Each ends with ``data.instruction``.
    """
    loaded = load_prompts(source, category=recipe.data.category, columns=recipe.data.columns_of(key))
    items = loaded.items[: recipe.data.max_prompts] if key == "prompts" else loaded.items
    if text := recipe.data.instruction:
        items = [replace(item, prompt=_instructed(item.prompt, text)) for item in items]
    return replace(loaded, items=items)


def _instructed(prompt: str | list[Message], text: str) -> str | list[Message]:
    if isinstance(prompt, str):
        return f"{prompt.rstrip()} {text}"
    turns = [dict(turn) for turn in prompt]
    for turn in [turn for turn in turns if turn["role"] == "user"][-1:]:
        turn["content"] = f"{turn['content'].rstrip()} {text}"
    return turns


def read_pairs(recipe: Recipe) -> Stream[Pair]:
    """The pairs of ``data.pairs``, as a stream: they may exceed memory."""
    data = recipe.data
    return stream_pairs(
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


def read_judged(recipe: Recipe) -> Loaded[Pair]:
    """The pairs of ``judge.pairs``."""
    columns, scored = recipe.data.columns_of("judge"), recipe.data.scored_pairs
    return load_pairs(recipe.judge.pairs, seed=recipe.run.seed, columns=columns, scored=scored)


def read_finetuning(recipe: Recipe, chat: bool = True) -> list[dict[str, Any]]:
    """The rows of ``sft.data``, for a model with or without a chat template."""
    return load_finetuning(recipe.sft.data, names=recipe.data.columns_of("sft"), chat=chat)


def read_rehearsal(recipe: Recipe, chat: bool = True) -> list[dict[str, Any]]:
    """The pairs of ``rl.rehearsal``, read like ``sft.data``: each assistant turn with the preceding turns.

    Args:
        recipe: The recipe.
        chat: Whether the model has a chat template.

    Raises:
        UserError: As in ``load_finetuning``; or a row is plain text, or its completion is not a single answer.
    """
    source = recipe.rl.rehearsal
    rows = load_finetuning(source, names=recipe.data.columns_of("rehearsal"), chat=chat)
    found = []
    for i, row in enumerate(rows if "text" not in rows[0] else [], 1):
        for pair in assistant_turns([row]) if "messages" in row else [row]:
            answer = pair["completion"]
            if not isinstance(answer, str) and (len(answer) != 1 or not answer[0]["content"]):
                what = f"The completion of row {i} is not one message."
                raise UserError(what, where=source, fix="Give a text, or one message.")
            found.append(pair)
    if not found:
        raise UserError(
            "Nothing here answers a prompt.", where=source, fix="Give 'prompt' and 'completion', or messages."
        )
    return found


def check_data(recipe: Recipe) -> None:
    """Read all files that a recipe's stages will read. Folders and Hub datasets are read only by their stage.

    Raises:
        UserError: With every problem in every file, which could otherwise end a run after hours.
    """
    problems: list[Problem] = []
    for _, source, read in _sources(recipe):
        if os.path.isfile(source):
            try:
                _read_through(read())
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError.from_problems(list(dict.fromkeys(problems)))


def prompt_overlaps(recipe: Recipe, largest: int | None = None) -> list[dict[str, Any]]:
    """Find evaluation and calibration prompts that are also trained on.

    Args:
        recipe: Its evaluation sets are compared with ``label.calibration`` and all training data, and
            ``label.calibration`` with the training data.
        largest: Only local files of at most this many bytes; None reads everything, including the Hub.

    Returns:
        For every two keys of the recipe that share prompts: ``held_out`` and ``training``, the keys; ``prompts``, the
        number of distinct prompts of the first; and ``shared``, how many of them the second contains.
    """
    keys: dict[str, set[str]] = {}
    for name, source, read in _sources(recipe):
        if largest is None or (os.path.isfile(source) and os.path.getsize(source) <= largest):
            try:
                keys[name] = {question_key(prompt) for prompt in _prompts_of(read())}
            except UserError:  # reported by check_data, or by the stage that reads it
                continue
    order = [name for name in keys if name.startswith(_EVALUATED)] + [name for name in keys if name == _CALIBRATION]
    found = []
    for i, name in enumerate(order):
        for other in [*order[i + 1 :], *(key for key in keys if key not in order)]:
            shared = len(keys[name] & keys[other])
            if shared and not (name.startswith(_EVALUATED) and other.startswith(_EVALUATED)):
                numbers = {"prompts": len(keys[name]), "shared": shared}
                found.append({"held_out": name, "training": other} | numbers)
    return found


def warn_of_overlaps(recipe: Recipe, section: str) -> list[dict[str, Any]]:
    """Warn about each of ``prompt_overlaps`` with the held-out data of ``evaluate`` or ``label``; return them."""
    own = {"evaluate": _EVALUATED, "label": (_CALIBRATION,)}[section]
    found = [of for of in prompt_overlaps(recipe) if of["held_out"].startswith(own)]
    for of in found:
        say(overlap_warning(of))
    return found


def overlap_warning(overlap: dict[str, Any]) -> str:
    """The warning for an entry of ``prompt_overlaps``."""
    shared, prompts, held_out, training = (overlap[k] for k in ("shared", "prompts", "held_out", "training"))
    return (
        f"Warning: {shared} of the {prompts} prompts of {held_out} are also in {training}. Results on these may "
        "not hold for new ones. Remove them from one of the two."
    )


def _read_through(rows: Any) -> None:
    deque(getattr(rows, "items", rows), maxlen=0)


def _prompts_of(rows: Any) -> Iterator[Any]:
    for row in getattr(rows, "items", rows):
        yield from finetuned_prompts(row) if isinstance(row, dict) else [row.prompt]


def _sources(recipe: Recipe) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Each data source that the stages read: its key in the recipe, the source, and the function that reads it."""
    data, rl, evaluate = recipe.data, recipe.rl, recipe.evaluate
    if recipe.sft:
        yield "sft.data", recipe.sft.data, partial(read_finetuning, recipe)
    if data.prompts and (recipe.sample or (rl and ALGORITHMS[rl.algorithm].samples)):
        yield "data.prompts", data.prompts, partial(read_prompts, recipe, data.prompts)
    if data.pairs:
        yield "data.pairs", data.pairs, partial(read_pairs, recipe)
    if recipe.judge and recipe.judge.pairs:
        yield "judge.pairs", recipe.judge.pairs, partial(read_judged, recipe)
    if recipe.label and recipe.label.calibration:
        yield _CALIBRATION, recipe.label.calibration, partial(read_calibration, recipe)
    if rl and rl.rehearsal:
        yield "rl.rehearsal", rl.rehearsal, partial(read_rehearsal, recipe)
    if evaluate:
        sets: dict[str, str | None] = {f"{_EVALUATED[0]}{name}": source for name, source in evaluate.sets.items()}
        for name, source in (sets or {_EVALUATED[1]: data.eval_prompts}).items():
            if source:
                yield name, source, partial(read_prompts, recipe, source, "eval_prompts")
