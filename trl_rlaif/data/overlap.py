"""Whether two prompts are the same one, so that what is held out was not trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from trl_rlaif.data.finetuning import assistant_turns
from trl_rlaif.data.records import Message


def prompt_key(prompt: str | Sequence[Message]) -> str:
    """A short text that is the same for prompts that ask the same.

    That is what users, tools and the assistant say, whatever the white space and the case of the letters. System turns
    do not count, and a text is the same as a conversation of one user turn.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [
        (turn["role"], _folded(turn.get("content"))) for turn in turns if turn["role"] not in ("system", "developer")
    ]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def finetuned_prompts(row: dict[str, Any]) -> list[str | list[Message]]:
    """The prompts whose answers a row of ``load_finetuning`` teaches; none of a plain text."""
    rows = assistant_turns([row]) if "messages" in row else [row]
    return [each["prompt"] for each in rows if "prompt" in each]


def split_by_group(groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out; the rows of one group stay together.

    Args:
        groups: Of N rows.
        share: Of the rows to hold out, in [0, 1): as near to it as whole groups come, and never all of them.
        seed: Of the drawing.

    Returns:
        (training, held out), indices in increasing order.
    """
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    drawn = list(rows.values())
    random.Random(seed).shuffle(drawn)
    held_out: list[int] = []
    for group in drawn[:-1]:  # one is left to train on
        if abs(len(held_out) + len(group) - share * len(groups)) < abs(len(held_out) - share * len(groups)):
            held_out += group
    chosen = set(held_out)
    return [i for i in range(len(groups)) if i not in chosen], sorted(held_out)


def _folded(content: Any) -> str:
    return " ".join(str(content or "").split()).casefold()
