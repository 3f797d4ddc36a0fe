r"""Anthropic's raw transcripts, ``"\n\nHuman: ...\n\nAssistant: ..."``, as messages."""

from __future__ import annotations

import re
from typing import Any

from trl_rlaif.data.messages import RowError, check_text
from trl_rlaif.data.rows import kind_of
from trl_rlaif.types import Message

# "Human:" inside a text starts a turn only after a blank line.
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Whether a value is a text with the markers of a transcript."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


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
        role, content = _ROLES[parts[index]], parts[index + 1].strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        elif content or index + 2 == len(parts):
            messages.append({"role": role, "content": content})
    return messages
