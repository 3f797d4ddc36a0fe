"""Texts and conversations of a row: their roles, contents and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trl_rlaif.data.rows import kind_of
from trl_rlaif.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names of speakers ("from") in ShareGPT's and similar files.
_SHAREGPT = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")


class RowError(Exception):
    """The row is invalid: ``what`` was found, and ``fix`` is what to write instead."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class RowSkip(Exception):
    """The row is valid but unusable, for example because a response is empty."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def short(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def blank(value: Any) -> bool:
    """Whether a value is null, an empty list, or white space."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def check_text(value: str, key: str) -> str:
    """Returns ``value`` if it can be encoded as UTF-8: JSON escapes can contain half a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{key!r} holds half of a surrogate pair, which is not a character.", "Remove it.") from None
    return value


# Keys that chat templates read besides role and content, such as reasoning and the call that a tool answers.
_BESIDE = ("name", "reasoning_content", "reasoning", "thinking", "tool_call_id")


def parse_messages(value: Sequence[Any], key: str, *, null_response: bool = False) -> list[Message]:
    """Checks a conversation and returns its roles and contents, and the other keys that chat templates read.

    A developer turn becomes a system turn, its older name, which every chat template knows; after a system turn it is
    appended to that. Text parts of a content are joined without a separator, as in chat templates.

    Args:
        value: The messages, with role and content, or ShareGPT's from and value; keys that no template reads are
            dropped.
        key: The column's name, for the error.
        null_response: Whether an assistant's content may be null, which counts as empty.

    Raises:
        RowError: One of them is not a text message.
    """
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        role, content = _parsed(message, number, key, null_response)
        if role == "developer" and messages and messages[-1]["role"] == "system":
            messages[-1]["content"] += f"\n\n{content}"
        else:
            beside = {name: message[name] for name in _BESIDE if message.get(name) is not None}
            messages.append({"role": "system" if role == "developer" else role, "content": content, **beside})
    return messages


def plain_turns(value: Sequence[Any], key: str) -> list[dict[str, Any]]:
    """A conversation for TRL's trainers: as ``parse_messages``, but turns keep their other keys and may call tools."""
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(value, 1):
        if isinstance(message, dict) and message.get("tool_calls"):
            turns.append(message)
            continue
        role, content = _parsed(message, number, key, null_response=True)
        rest = {name: item for name, item in message.items() if name not in ("from", "value")}
        turns.append({**rest, "role": "system" if role == "developer" else role, "content": content})
    return turns


def _parsed(message: Any, number: int, key: str, null_response: bool) -> tuple[str, str]:
    """The role and text of a message."""
    name = f"message {number} of {key!r}"
    role, content = _role_and_content(message, name)
    content = "" if content is None and role == "assistant" and null_response else content
    return role, check_text(_joined(content, name), key)


def _role_and_content(message: Any, name: str) -> tuple[str, Any]:
    if isinstance(message, dict) and message.get("tool_calls"):
        raise RowError(f"{_upper(name)} calls tools, and only text is read.", "Write the call as text in its content.")
    if isinstance(message, dict) and "role" in message and "content" in message:
        role, known = message["role"], {role: role for role in ROLES}
    elif isinstance(message, dict) and "from" in message and "value" in message:
        role, known = message["from"], _SHAREGPT
    else:
        raise RowError(
            f"{_upper(name)} is not an object with a role and a content.",
            'Write {"role": "user", "content": "..."}.',
        )
    if not isinstance(role, str) or role not in known:
        raise RowError(f"Unknown role {short(role)} in {name}.", f"Use one of {', '.join(known)}.")
    return known[role], message.get("content", message.get("value"))


def _joined(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"The content of {name} is {kind_of(content)}.", "Write a text.")
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            found = f"of the type {short(kind)}" if kind else f"{kind_of(part)} without a type"
            found = "without a text" if kind in _TEXT_PARTS else found
            raise RowError(
                f"Part {number} of the content of {name} is {found}, and only text is read.",
                'Write {"type": "text", "text": "..."}, or leave the row out.',
            )
    return "".join(part["text"] for part in content)


def _upper(name: str) -> str:
    return name[0].upper() + name[1:]


def parse_prompt(value: Any, key: str = "prompt") -> str | list[Message]:
    """Checks a prompt: a text, or messages with a user turn; not blank.

    The last turn is a user's or a tool's, to be answered, or an assistant's, which the response continues.
    """
    if blank(value):
        found = "missing" if value is None else "empty"
        raise RowError(f"The row has no prompt: {key!r} is {found}.", f'Write "{key}" as a text or a list of messages.')
    if isinstance(value, str):
        return check_text(value, key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is {kind_of(value)}.", "Write a text or a list of messages.")
    messages = parse_messages(value, key)
    # An empty last assistant turn is the same as none: the response starts there.
    while messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise RowError(
            f"{key!r} ends with the role {value[-1].get('role', value[-1].get('from'))!r}.",
            "End it with the user turn to be answered.",
        )
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise RowError(f"The row has no prompt: {key!r} has no user turn.", "Add what the user says.")
    if not users[-1]["content"].strip():
        raise RowError(f"The row has no prompt: the last user turn of {key!r} is empty.", "Write what the user says.")
    return messages


def before_answer(value: Any, key: str) -> Any:
    """A conversation without its trailing assistant turns; a text is rejected, other values are returned unchanged."""
    if isinstance(value, str) and value.strip():
        raise RowError(f"{key!r} is a text.", 'Write a list of messages, or name the column "prompt".')
    if not isinstance(value, list):
        return value
    end = len(value)
    while end and _is_assistant(value[end - 1]):
        end -= 1
    return value[:end]


def _is_assistant(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    role = message.get("role", message.get("from"))
    return isinstance(role, str) and _SHAREGPT.get(role) == "assistant"


def join_responses(messages: Sequence[Message]) -> str | None:
    """The contents of assistant messages, joined by a blank line; None if there is another role."""
    if any(message["role"] != "assistant" for message in messages):
        return None
    return "\n\n".join(message["content"] for message in messages if message["content"].strip())


def same_turn(first: Message, second: Message) -> bool:
    """Whether two turns are equal up to white space."""
    return first["role"] == second["role"] and first["content"].split() == second["content"].split()
