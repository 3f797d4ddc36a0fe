"""Detects equal prompts, to keep held-out prompts out of training."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from trl_rlaif.data.finetuning import assistant_turns
from trl_rlaif.types import Message


def prompt_key(prompt: str | Sequence[Message]) -> str:
    """A short digest that is the same for prompts that differ only in white space or case.

    A text counts as a conversation of one user turn.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [(turn["role"], " ".join(_text(turn).split()).casefold(), turn.get("tool_calls")) for turn in turns]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def question_key(prompt: str | Sequence[Message]) -> str:
    """The same without system turns, to detect held-out prompts trained on under other instructions."""
    if isinstance(prompt, str):
        return prompt_key(prompt)
    return prompt_key([turn for turn in prompt if turn["role"] not in ("system", "developer")])


def finetuned_prompts(row: dict[str, Any]) -> list[str | list[Message]]:
    """The prompts whose answers a row of ``load_finetuning`` teaches; none for a plain text."""
    rows = assistant_turns([row]) if "messages" in row else [row]
    return [each["prompt"] for each in rows if "prompt" in each]


def split_by_group(groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out rows; the rows of one group stay together.

    Args:
        groups: Groups of N rows.
        share: Fraction of rows to hold out, in [0, 1): approximated by whole groups, never all of them.
        seed: Random seed.

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


def _text(turn: Message) -> str:
    """The text of a turn; text parts are joined."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text", part)) for part in content)
