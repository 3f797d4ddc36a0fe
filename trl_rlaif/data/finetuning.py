"""Data for supervised fine-tuning, in the formats of TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_rlaif.data.fields import Columns, columns
from trl_rlaif.data.formats import alpaca_prompt, with_system
from trl_rlaif.data.messages import RowError, blank, plain_turns
from trl_rlaif.data.rows import Problems, kind_of, open_source
from trl_rlaif.errors import UserError

_READ = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "text")


def load_finetuning(
    source: str | Path, *, names: Mapping[str, str] | None = None, chat: bool = True
) -> list[dict[str, Any]]:
    """Rows in one of TRL's formats: ``prompt`` and ``completion``, ``messages``, or ``text``.

    ShareGPT's ``conversations`` become messages; Alpaca's ``instruction``, ``input`` and ``output`` become prompt and
    completion. Lists of text parts become texts.

    Args:
        source: As in `load_prompts`.
        names: The file's own column names, such as ``{"completion": "answer"}``.
        chat: Whether the model has a chat template; Alpaca's texts then become user and assistant turns.

    Raises:
        UserError: The source or some of its rows are invalid; up to ten problems with their locations.
    """
    problems, known = Problems(), Columns(names or {}, _READ)
    _, rows = open_source(source, problems)
    found, form = [], None
    for row in map(known.renamed, rows):
        try:
            form = form or _form(row.values)
            found.append(_FORMS[form](row.values, chat))
        except RowError as error:
            problems.add(known.explained(error.what), where=row.where, fix=error.fix)
    known.check()
    problems.raise_if_any()
    if not found:
        raise UserError("There are no rows.", where=str(source))
    return found


def assistant_turns(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conversations as TRL's ``prompt`` and ``completion``: one row per assistant turn.

    Args:
        rows: With ``messages``. An assistant turn with nothing before it is not a completion.
    """
    return [
        {"prompt": row["messages"][:i], "completion": [turn]}
        for row in rows
        for i, turn in enumerate(row["messages"])
        if i and turn["role"] == "assistant"
    ]


def _form(row: dict[str, Any]) -> tuple[str, ...]:
    """The columns that identify a file's format."""
    form = next((form for form in _FORMS if row.keys() >= set(form)), None)
    if form is None:
        raise RowError(
            "Fine-tuning data needs 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and "
            f"'output', or 'text'; the columns are {columns(row)}.",
            "Rename them, or name them in data.columns.",
        )
    return form


def _needed(row: dict[str, Any], *keys: str) -> list[Any]:
    for key in keys:
        if blank(row.get(key)):
            raise RowError(f"The row has no {key!r}.", "Write it, or leave the row out.")
    return [row[key] for key in keys]


def _turns(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a list of messages.")
    return plain_turns(value, key)


def _conversation(key: str) -> Callable[[dict[str, Any], bool], dict[str, Any]]:
    def read(row: dict[str, Any], chat: bool) -> dict[str, Any]:
        return {"messages": _turns(with_system(row, _needed(row, key)[0]), key)}

    return read


def _completion(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    sides = dict(zip(("prompt", "completion"), _needed(row, "prompt", "completion"), strict=True))
    return {key: value if isinstance(value, str) else _turns(value, key) for key, value in sides.items()}


def _alpaca(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    _, output = _needed(row, "instruction", "output")
    prompt = alpaca_prompt(row)
    if not isinstance(output, str):
        raise RowError(f"'output' is {kind_of(output)}.", "Write a text.")
    if not chat:
        return {"prompt": f"{prompt}\n\n", "completion": output}
    return {
        "prompt": with_system(row, [{"role": "user", "content": prompt}]),
        "completion": [{"role": "assistant", "content": output}],
    }


def _text(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    return {"text": _needed(row, "text")[0]}


# Parser of each format, by its identifying columns; the first match counts, as in TRL's SFTTrainer.
_FORMS: dict[tuple[str, ...], Callable[[dict[str, Any], bool], dict[str, Any]]] = {
    ("prompt", "completion"): _completion,
    ("messages",): _conversation("messages"),
    ("conversations",): _conversation("conversations"),
    ("instruction", "output"): _alpaca,
    ("text",): _text,
}
