"""Separates the prompt of two texts or conversations from their responses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trl_rlaif.data.messages import (
    RowError,
    RowSkip,
    blank,
    check_text,
    join_responses,
    parse_messages,
    parse_prompt,
    same_turn,
)
from trl_rlaif.data.rows import kind_of
from trl_rlaif.data.transcripts import is_transcript, parse_transcript
from trl_rlaif.types import Message

EMPTY_RESPONSE = "empty response"
IDENTICAL = "responses are identical"
DIVERGED = "transcripts differ before the last turn"
NO_RESPONSE_TURN = "transcript does not end with an assistant turn"
EMPTY_PROMPT = "empty prompt"
OTHER_PROMPT = "conversation does not begin with the prompt"


def shared_prompt(row: dict[str, Any]) -> str | list[Message]:
    """The prompt of a preference row without a prompt column.

    It is the shared prefix of chosen and rejected, up to the last user turn of conversations. Rows that are unusable as
    pairs, because responses are equal or missing, still have a prompt.
    """
    sides = {key: read_side(row[key], key) for key in ("chosen", "rejected") if not blank(row.get(key))}
    if not sides:
        raise RowSkip(EMPTY_PROMPT)
    if any(isinstance(side, str) and not is_transcript(side) for side in sides.values()):
        if len(sides) < 2:
            raise RowSkip(EMPTY_RESPONSE)
        check_alike(*sides.values())
        return split_texts(*sides.values())[0]
    talks = [
        parse_transcript(side, key) if isinstance(side, str) else parse_messages(side, key, null_response=True)
        for key, side in sides.items()
    ]
    cut = _last_user(talks[0], _shared(*talks) if len(talks) == 2 else len(talks[0]))
    if not cut or not talks[0][cut - 1]["content"].strip():
        raise RowSkip(EMPTY_PROMPT)
    return parse_prompt(talks[0][:cut], "chosen")


def read_side(value: Any, key: str) -> str | list[Any]:
    """``chosen`` or ``rejected``: a text or messages; a single message becomes a list."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, (str, list)):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of messages.")
    return check_text(value, key) if isinstance(value, str) else value


def check_alike(chosen: Any, rejected: Any) -> None:
    """Raises RowError if one response is a text and the other is messages."""
    if type(chosen) is not type(rejected):
        raise RowError(
            f"'chosen' is {kind_of(chosen)} and 'rejected' is {kind_of(rejected)}.",
            "Write both in the same way.",
        )


def join(messages: Sequence[Message]) -> str:
    """The text of a response; raises RowSkip if there is a role other than the assistant."""
    joined = join_responses(messages)
    if joined is None:
        raise RowSkip(DIVERGED)
    return joined


def unusable(first: str, second: str) -> str | None:
    """Why two responses do not form a pair; None if they do."""
    if not first.strip() or not second.strip():
        return EMPTY_RESPONSE
    return IDENTICAL if first.strip() == second.strip() else None


def check_pair(first: str, second: str) -> tuple[str, str]:
    """Both responses unchanged; raises RowSkip if they do not form a pair."""
    reason = unusable(first, second)
    if reason is not None:
        raise RowSkip(reason)
    return first, second


def split_after(
    explicit: str | list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], str, str]:
    """Splits two conversations after the prompt that they repeat, and any further shared turns up to a user's.

    If both start with the same system turn, it is added to a prompt that has none.
    """
    if isinstance(explicit, str):
        is_talk = explicit.lstrip().startswith("Human:")
        explicit = parse_transcript(explicit, "prompt") if is_talk else [{"role": "user", "content": explicit}]
        explicit = parse_prompt(explicit)
    first, second = _after(explicit, chosen), _after(explicit, rejected)
    cut = _last_user(first, _shared(first, second))
    prompt = [*explicit, *first[:cut]]
    if prompt[0]["role"] != "system" and chosen[0] == rejected[0] and chosen[0]["role"] == "system":
        prompt = [chosen[0], *prompt]
    return prompt, *check_pair(join(first[cut:]), join(second[cut:]))


def _after(prompt: list[Message], side: list[Message]) -> list[Message]:
    """The rest of a conversation that repeats the prompt; all of one that starts with the answer.

    White space and system turns may differ. If the prompt ends with the start of the answer, the rest starts with the
    remainder of the answer.
    """
    wanted = [turn for turn in prompt if turn["role"] != "system"]
    spoken = [turn for turn in side if turn["role"] != "system"]
    begun, rest = wanted[-1], spoken[len(wanted) - 1 :]
    if all(map(same_turn, wanted[:-1], spoken)) and rest:
        if same_turn(begun, rest[0]):
            return rest[1:]
        if begun["role"] == rest[0]["role"] == "assistant" and rest[0]["content"].startswith(begun["content"]):
            return [{**rest[0], "content": rest[0]["content"][len(begun["content"]) :]}, *rest[1:]]
    if spoken and spoken[0]["role"] != "assistant":
        raise RowSkip(OTHER_PROMPT)
    return side


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the shared prefix."""
    shortest = min(len(first), len(second))
    return next((index for index in range(shortest) if first[index] != second[index]), shortest)


def _last_user(messages: Sequence[Message], end: int) -> int:
    """Number of messages up to the last user or tool turn among the first ``end``; 0 if there is none."""
    return next((index for index in range(end, 0, -1) if messages[index - 1]["role"] in ("user", "tool")), 0)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits two texts after the prompt that they share.

    As in TRL's `extract_prompt`, where a space in between goes to the responses; but words are not
    split, because a judge reads the responses unchanged.
    """
    if chosen.strip() == rejected.strip():
        raise RowSkip(IDENTICAL)
    cut = _shared(chosen, rejected)
    word = re.search(r"(?<=\s)\S+\Z", chosen[:cut])
    if word and any(text[cut : cut + 1].strip() for text in (chosen, rejected)):
        cut = word.start()
    if chosen[cut - 1 : cut] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise RowError("The row has no prompt: 'chosen' and 'rejected' share no beginning.", 'Add a "prompt" column.')
    return chosen[:cut], *check_pair(chosen[cut:], rejected[cut:])


def split_conversations(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """Splits two conversations after the last user turn that they share."""
    if chosen == rejected:
        raise RowSkip(IDENTICAL)
    cut = _last_user(chosen, _shared(chosen, rejected))
    if not cut:
        if any(message["role"] == "user" for message in chosen + rejected):
            raise RowSkip(DIVERGED)
        raise RowError("The row has no prompt: no user turn comes before the responses.", 'Add a "prompt" column.')
    first, second = check_pair(join(chosen[cut:]), join(rejected[cut:]))
    return parse_prompt(chosen[:cut], "chosen"), first, second
