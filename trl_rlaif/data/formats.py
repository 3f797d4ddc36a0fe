"""From one row to a prompt or a pair: the shapes that data comes in, and what each of them must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trl_rlaif.data.reading import kind_of
from trl_rlaif.data.records import Message

ROLES = ("system", "user", "assistant")

EMPTY_RESPONSE = "empty response"
IDENTICAL = "responses are identical"
DIVERGED = "transcripts differ before the last turn"
NO_RESPONSE_TURN = "transcript does not end with an assistant turn"
EMPTY_PROMPT = "empty prompt"

# "Human:" inside a text starts a turn only after a blank line.
_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """The row is wrong: ``what`` was found and ``fix`` says what to write instead."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class RowSkip(Exception):
    """The row is in order but of no use, for example because a response is empty."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def check_text(value: str, key: str) -> str:
    """Returns ``value`` if it can be written as UTF-8: JSON's escapes can spell half a character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{key!r} holds half of a surrogate pair, which is not a character.", "Remove it.") from None
    return value


# Columns that prompts and pairs share


def parse_id(value: Any, default: str) -> str:
    """The row's id as text, or ``default`` where it has none."""
    if _blank(value):
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"'id' is {kind_of(value)}.", "Write a text or a whole number.")
    return check_text(str(value), "id")


def parse_category(value: Any, key: str) -> str | None:
    """The category as text; None for a missing or blank one."""
    if _blank(value):
        return None
    if isinstance(value, (list, dict)):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write one category, as a text.")
    return check_text(str(value), key)


def parse_messages(value: list[Any], key: str, *, null_response: bool = False) -> list[Message]:
    """Checks a conversation and returns its roles and contents.

    Args:
        value: The messages; keys other than role and content are left out.
        key: The column's name, for the error.
        null_response: Whether an assistant's content may be null, and counts as empty.
    """
    messages = []
    for number, message in enumerate(value, 1):
        name = f"message {number} of {key!r}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(
                f"{name[0].upper()}{name[1:]} is not an object with a role and a content.",
                'Write {"role": "user", "content": "..."}.',
            )
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise RowError(f"Unknown role {_short(role)} in {name}.", f"Use one of {', '.join(ROLES)}.")
        if content is None and role == "assistant" and null_response:
            content = ""
        if not isinstance(content, str):
            raise RowError(f"The content of {name} is {kind_of(content)}.", "Write a text.")
        messages.append({"role": role, "content": check_text(content, key)})
    return messages


def parse_prompt(value: Any, key: str = "prompt") -> str | list[Message]:
    """Checks a prompt: a text, or messages of which the last is the user's; not blank."""
    if _blank(value):
        found = "missing" if value is None else "empty"
        raise RowError(f"The row has no prompt: {key!r} is {found}.", f'Write "{key}" as a text or a list of messages.')
    if isinstance(value, str):
        return check_text(value, key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of messages.")
    messages = parse_messages(value, key)
    if messages[-1]["role"] != "user":
        raise RowError(
            f"{key!r} ends with the role {messages[-1]['role']!r}.",
            "End it with the user turn to be answered.",
        )
    if not messages[-1]["content"].strip():
        raise RowError(f"The row has no prompt: the last user turn of {key!r} is empty.", "Write what the user says.")
    return messages


def parse_prompt_row(row: dict[str, Any]) -> tuple[str | list[Message], set[str]]:
    """The prompt of a row, and the columns used: ``prompt``, else ``messages`` up to the last user turn."""
    if row.get("prompt") is not None or row.get("messages") is None:
        if "prompt" not in row and ("chosen" in row or "response_1" in row):
            raise RowError(
                "The row is a pair of responses without a 'prompt' column.",
                "Load it as pairs, or add the prompt.",
            )
        if "prompt" not in row:
            raise RowError(f"The row has no prompt: its columns are {_columns(row)}.", 'Add "prompt" or "messages".')
        return parse_prompt(row["prompt"]), {"prompt"}
    value = row["messages"]
    if isinstance(value, str) and value.strip():
        raise RowError("'messages' is a text.", 'Write a list of messages, or name the column "prompt".')
    if isinstance(value, list):
        end = len(value)
        while end and isinstance(value[end - 1], dict) and value[end - 1].get("role") == "assistant":
            end -= 1
        value = value[:end]
    return parse_prompt(value, "messages"), {"messages", "prompt"}


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(repr(str(key)) for key in list(row)[:12]) or "none"


# The shapes of pairs


def detect_format(row: dict[str, Any]) -> str | None:
    """Which shape a row has: "responses", "hh", "preference" or "implicit".

    Returns None where every response is null, so that the row is of no use and says nothing about its
    neighbours. Raises RowError where there are no columns for responses, or both kinds.
    """
    sides = [key for key in ("chosen", "rejected") if key in row]
    numbered = [key for key in ("response_1", "response_2") if key in row]
    if not sides and not numbered:
        raise RowError(
            f"The row has no responses: its columns are {_columns(row)}.",
            'Write "chosen" and "rejected", or "response_1" and "response_2".',
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
    if row.get("prompt") is None and any(_is_transcript(row[key]) for key in sides):
        return "hh"
    return "preference" if "prompt" in row else "implicit"


def check_columns(row: dict[str, Any], shape: str) -> None:
    """Raises RowError where a row has neither of the two response columns of its format."""
    keys = ("response_1", "response_2") if shape == "responses" else ("chosen", "rejected")
    if not any(key in row for key in keys):
        raise RowError(
            f"The row has no {keys[0]!r} and {keys[1]!r}: its columns are {_columns(row)}.",
            "Write both, or set another format.",
        )


def parse_responses(row: dict[str, Any]) -> tuple[str | list[Message], str, str]:
    """(prompt, response_1, response_2) of a row in the responses format."""
    prompt = parse_prompt(row.get("prompt"))
    first, second = (_response(row.get(key), key) for key in ("response_1", "response_2"))
    return prompt, *_check_pair(first, second)


def parse_human(value: Any) -> int | None:
    """1 or 2, the response that a person (or a strict majority of votes) preferred; 0 a tie; None unknown."""
    if isinstance(value, list):
        votes = [vote for vote in map(parse_human, value) if vote is not None]
        if not votes:
            return None
        return next((side for side in (1, 2) if 2 * votes.count(side) > len(votes)), 0)
    if _blank(value):
        return None
    if isinstance(value, str) and value.strip() in ("0", "1", "2"):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1, 2):
        raise RowError(
            f"'human' is {_short(value)}.",
            "Write 1 or 2 for the preferred response, 0 for a tie, or a list of votes.",
        )
    return int(value)


def _response(value: Any, key: str) -> str:
    """The response's text: of a list of assistant messages, their contents joined by a blank line."""
    if _blank(value):
        raise RowSkip(EMPTY_RESPONSE)
    if isinstance(value, str):
        return check_text(value, key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of assistant messages.")
    return _join(parse_messages(value, key, null_response=True))


def _join(messages: Sequence[Message]) -> str:
    if any(message["role"] != "assistant" for message in messages):
        raise RowSkip(DIVERGED)
    return "\n\n".join(message["content"] for message in messages if message["content"].strip())


def _check_pair(first: str, second: str) -> tuple[str, str]:
    if not first.strip() or not second.strip():
        raise RowSkip(EMPTY_RESPONSE)
    if first.strip() == second.strip():
        raise RowSkip(IDENTICAL)
    return first, second


def parse_preference(row: dict[str, Any]) -> tuple[str | list[Message], str, str]:
    """(prompt, chosen, rejected) of a row in TRL's preference format, with or without a prompt of its own.

    A text prompt beside lists of messages counts as one user turn, and conversations that repeat the
    prompt are cut after it.
    """
    explicit = parse_prompt(row["prompt"]) if "prompt" in row else None
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if _blank(chosen) or _blank(rejected):
        raise RowSkip(EMPTY_RESPONSE)
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, (str, list)):
            raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of messages.")
    if type(chosen) is not type(rejected):
        raise RowError(
            f"'chosen' is {kind_of(chosen)} and 'rejected' is {kind_of(rejected)}.",
            "Write both in the same way.",
        )
    if isinstance(chosen, str):
        check_text(chosen, "chosen")
        check_text(rejected, "rejected")
        if explicit is None:
            return _split_texts(chosen, rejected)
        return explicit, *_check_pair(chosen, rejected)
    sides = [parse_messages(row[key], key, null_response=True) for key in ("chosen", "rejected")]
    if explicit is None:
        return _split_conversations(*sides)
    turns = [{"role": "user", "content": explicit}] if isinstance(explicit, str) else explicit
    first, second = (_join(side[len(turns) :] if side[: len(turns)] == turns else side) for side in sides)
    return turns, *_check_pair(first, second)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the beginning that the two share."""
    shortest = min(len(first), len(second))
    return next((index for index in range(shortest) if first[index] != second[index]), shortest)


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits two texts after the prompt that they share.

    As trl's `extract_prompt`, and a space in between goes to the responses; but words are not cut in
    two, because a judge reads the responses as they are.
    """
    if chosen.strip() == rejected.strip():
        raise RowSkip(IDENTICAL)
    cut = _shared(chosen, rejected)
    word = re.search(r"(?<=\s)\S+$", chosen[:cut])
    if word and any(text[cut : cut + 1].strip() for text in (chosen, rejected)):
        cut = word.start()
    if chosen[cut - 1 : cut] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise RowError("The row has no prompt: 'chosen' and 'rejected' share no beginning.", 'Add a "prompt" column.')
    return chosen[:cut], *_check_pair(chosen[cut:], rejected[cut:])


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """Splits two conversations after the last user turn that they share."""
    if chosen == rejected:
        raise RowSkip(IDENTICAL)
    cut = _shared(chosen, rejected)
    while cut and chosen[cut - 1]["role"] != "user":
        cut -= 1
    if not cut:
        if any(message["role"] == "user" for message in chosen + rejected):
            raise RowSkip(DIVERGED)
        raise RowError("The row has no prompt: no user turn comes before the responses.", 'Add a "prompt" column.')
    first, second = _check_pair(_join(chosen[cut:]), _join(rejected[cut:]))
    return parse_prompt(chosen[:cut], "chosen"), first, second  # type: ignore[return-value]


# Anthropic's transcripts


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def parse_hh(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected) of a row with two of Anthropic's raw transcripts."""
    sides = []
    for key in ("chosen", "rejected"):
        if _blank(row.get(key)):
            raise RowSkip(EMPTY_RESPONSE)
        sides.append(parse_transcript(row[key], key))
    for side in sides:
        if side[-1]["role"] != "assistant":
            raise RowSkip(NO_RESPONSE_TURN)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise RowSkip(DIVERGED)
    # The published data has oddities that its users cannot mend, so they are skipped and not errors.
    if len(chosen) < 2 or not chosen[-2]["content"]:
        raise RowSkip(EMPTY_PROMPT)
    return chosen[:-1], *_check_pair(chosen[-1]["content"], rejected[-1]["content"])


def parse_transcript(text: Any, key: str) -> list[Message]:
    """The turns of a raw transcript; one speaker's turns in a row are joined, and empty ones dropped."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        found = "starts differently" if isinstance(text, str) else f"is {kind_of(text)}"
        raise RowError(
            f"{key!r} is not a transcript: it {found}.",
            r'Write "\n\nHuman: ...\n\nAssistant: ..." or set another format.',
        )
    parts = _TURN.split("\n\n" + check_text(text, key).lstrip().replace("\r\n", "\n"))[1:]
    messages: list[Message] = []
    for index in range(0, len(parts), 2):
        role, content = _HH_ROLES[parts[index]], parts[index + 1].strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        elif content or index + 2 == len(parts):
            messages.append({"role": role, "content": content})
    return messages
