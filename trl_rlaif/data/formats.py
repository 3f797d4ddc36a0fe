"""Parses one row into a prompt or a pair: the supported formats, and what each of them must contain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_rlaif.data.fields import columns, parse_number
from trl_rlaif.data.messages import RowError, RowSkip, before_answer, blank, check_text, parse_messages, parse_prompt
from trl_rlaif.data.rows import kind_of
from trl_rlaif.data.splitting import (
    DIVERGED,
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    NO_RESPONSE_TURN,
    check_alike,
    check_pair,
    join,
    read_side,
    shared_prompt,
    split_after,
    split_conversations,
    split_texts,
)
from trl_rlaif.data.transcripts import is_transcript, parse_transcript
from trl_rlaif.types import Message

# The columns searched for a prompt, in this order; Alpaca's "input" goes with "instruction".
PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction")
# Further columns that belong to a prompt.
_BESIDE = {"instruction": {"input", "system"}, "messages": {"system"}, "conversations": {"system"}}
# Columns with a list of responses, each with a score.
SCORED_KEYS = ("responses", "completions")
# Columns of a preference file about the responses, which its prompt does not use.
RESPONSE_KEYS = ("chosen", "rejected", "response_1", "response_2", "human", "score_chosen", "score_rejected", "margin")
RESPONSE_KEYS += ("completion", "label", *SCORED_KEYS, "scores")
PROMPT_COLUMNS = ("id", "category", *PROMPT_KEYS, "input", "system")
# All column names that are read.
COLUMNS = (*PROMPT_COLUMNS, *RESPONSE_KEYS, "output", "text")


# Prompts


def find_prompt(row: dict[str, Any]) -> str | list[Message] | None:
    """The prompt in a row's prompt columns; None if it has none.

    It is ``prompt``; ``messages`` or ``conversations`` up to the answer; or Alpaca's ``instruction``, with ``input``
    after a blank line. With the last three, a column ``system`` becomes the first turn.
    """
    key = next((key for key in PROMPT_KEYS if row.get(key) is not None), None)
    key = key or next((key for key in PROMPT_KEYS if key in row), None)
    if key is None:
        return None
    if key == "prompt":
        return parse_prompt(row["prompt"])
    if key == "instruction":
        prompt = parse_prompt(alpaca_prompt(row), key)
        return with_system(row, [{"role": "user", "content": prompt}]) if "system" in row else prompt
    turns = before_answer(row[key], key)
    return parse_prompt(with_system(row, turns) if turns else turns, key)


def with_system(row: dict[str, Any], turns: Any) -> Any:
    """A conversation with the column ``system`` as its first turn, if there is one with text."""
    system = row.get("system")
    if not isinstance(turns, list) or not isinstance(system, str) or not system.strip():
        return turns
    return [{"role": "system", "content": system}, *turns]


def prompt_columns(row: dict[str, Any]) -> set[str]:
    """The columns that ``find_prompt`` reads from a row."""
    key = next((key for key in PROMPT_KEYS if row.get(key) is not None), "prompt")
    return {"prompt", key} | _BESIDE.get(key, set())


def alpaca_prompt(row: dict[str, Any]) -> Any:
    """Alpaca's instruction, with the input after a blank line if there is one."""
    instruction, given = row["instruction"], row.get("input")
    for key, value in (("instruction", instruction), ("input", given)):
        if value is not None and not isinstance(value, str):
            raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text.")
    return instruction if blank(given) or blank(instruction) else f"{instruction}\n\n{given}"


def parse_prompt_row(row: dict[str, Any]) -> tuple[str | list[Message], set[str]]:
    """The prompt of a row, and the columns used. A row of a preference file has the prompt of its pair."""
    used = set(RESPONSE_KEYS) if is_preference(row) else set()
    found = find_prompt(row)
    if found is not None:
        return found, used | prompt_columns(row)
    if "chosen" in row or "rejected" in row:
        return shared_prompt(row), used
    raise RowError(f"The row has no prompt: its columns are {columns(row)}.", f"Add {_listed(PROMPT_KEYS)}.")


def is_preference(row: dict[str, Any]) -> bool:
    """Whether a row rates its responses, or has two to be judged."""
    pair = {"chosen", "rejected"} <= row.keys() or {"response_1", "response_2"} <= row.keys()
    return pair or ("completion" in row and isinstance(row.get("label"), bool)) or any(k in row for k in SCORED_KEYS)


def _listed(keys: Sequence[str]) -> str:
    return f"{', '.join(map(repr, keys[:-1]))} or {keys[-1]!r}"


# The shapes of pairs


def detect_format(row: dict[str, Any]) -> str | None:
    """The format of a row: "responses", "hh", "preference", "implicit", "kto" or "scored".

    Returns None if every response is null: the row is unusable and does not determine the format.
    Raises RowError if there are no columns for responses, or two kinds of them.
    """
    sides = [key for key in ("chosen", "rejected") if key in row]
    numbered = [key for key in ("response_1", "response_2") if key in row]
    if not sides and not numbered:
        if {"completion", "label"} <= row.keys():
            return "kto"
        if any(key in row for key in SCORED_KEYS):
            return "scored"
        raise RowError(
            f"The row has no responses: its columns are {columns(row)}.",
            'Write "chosen" and "rejected", or "response_1" and "response_2"; or name the columns in data.columns.',
        )
    sides = [key for key in sides if row[key] is not None]
    numbered = [key for key in numbered if row[key] is not None]
    if sides and numbered:
        raise RowError(
            "The row has both chosen/rejected and response_1/response_2.",
            'Set format to "preference" or "responses".',
        )
    if numbered:
        return "responses"
    if not sides:
        return None
    own = has_prompt(row)
    if (not own or row.get("prompt", "") is None) and any(is_transcript(row[key]) for key in sides):
        return "hh"
    return "preference" if own else "implicit"


def has_prompt(row: dict[str, Any]) -> bool:
    """Whether a row has a prompt column."""
    return any(key in row for key in PROMPT_KEYS)


# The response columns of each format; a row has at least one.
_COLUMNS = {"responses": ("response_1", "response_2"), "kto": ("completion", "label"), "scored": SCORED_KEYS}


def check_columns(row: dict[str, Any], shape: str) -> None:
    """Raises RowError if a row has neither of the two response columns of its format."""
    keys = _COLUMNS.get(shape, ("chosen", "rejected"))
    if not any(key in row for key in keys):
        raise RowError(
            f"The row has no {keys[0]!r} and {keys[1]!r}: its columns are {columns(row)}.",
            "Write both, or set another format.",
        )


def parse_responses(row: dict[str, Any]) -> tuple[str | list[Message], str, str]:
    """(prompt, response_1, response_2) of a row in the responses format."""
    prompt = find_prompt(row)
    if prompt is None:
        prompt = parse_prompt(None)
    first, second = (parse_response(row.get(key), key) for key in ("response_1", "response_2"))
    return prompt, *check_pair(first, second)


def parse_response(value: Any, key: str) -> str:
    """The response's text; the contents of a list of assistant messages are joined by a blank line."""
    if blank(value):
        raise RowSkip(EMPTY_RESPONSE)
    if isinstance(value, str):
        return check_text(value, key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of assistant messages.")
    return join(parse_messages(value, key, null_response=True))


def is_tie(row: dict[str, Any]) -> bool:
    """Whether a row gives both responses the same score, so that their order is meaningless."""
    chosen, rejected = (parse_number(row.get(key), key) for key in ("score_chosen", "score_rejected"))
    return chosen is not None and chosen == rejected


def parse_preference(row: dict[str, Any]) -> tuple[str | list[Message], str, str]:
    """(prompt, chosen, rejected) of a row in TRL's preference format, with or without a prompt column.

    With lists of messages, a text prompt counts as one user turn, and conversations that repeat the
    prompt are cut after it.
    """
    explicit = find_prompt(row)
    if blank(row.get("chosen")) or blank(row.get("rejected")):
        raise RowSkip(EMPTY_RESPONSE)
    chosen, rejected = (read_side(row[key], key) for key in ("chosen", "rejected"))
    check_alike(chosen, rejected)
    if isinstance(chosen, str):
        if explicit is None:
            return split_texts(chosen, rejected)
        if not (is_transcript(chosen) and is_transcript(rejected)):
            return explicit, *check_pair(chosen, rejected)
        sides = [parse_transcript(chosen, "chosen"), parse_transcript(rejected, "rejected")]
    else:
        sides = [parse_messages(chosen, "chosen", null_response=True)]
        sides += [parse_messages(rejected, "rejected", null_response=True)]
    if explicit is None:
        return split_conversations(*sides)
    return split_after(explicit, *sides)


def parse_hh(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected) of a row with two of Anthropic's raw transcripts."""
    sides = []
    for key in ("chosen", "rejected"):
        if blank(row.get(key)):
            raise RowSkip(EMPTY_RESPONSE)
        sides.append(parse_transcript(row[key], key))
    for side in sides:
        if side[-1]["role"] != "assistant":
            raise RowSkip(NO_RESPONSE_TURN)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise RowSkip(DIVERGED)
    # The published data has defects that its users cannot fix, so they are skipped, not errors.
    if len(chosen) < 2 or not chosen[-2]["content"]:
        raise RowSkip(EMPTY_PROMPT)
    return chosen[:-1], *check_pair(chosen[-1]["content"], rejected[-1]["content"])
