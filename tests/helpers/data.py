"""Shared by the data tests: conversation turns, the sides of a pair, and error messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trl_rlaif.data import Pair, load_pairs
from trl_rlaif.errors import UserError

USER = {"role": "user", "content": "Sky?"}


def says(text: str) -> dict[str, str]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text}


def fails(source: Any, load: Callable[..., Any] = load_pairs, **kwargs: Any) -> str:
    """The message of the UserError that loading a source raises."""
    with pytest.raises(UserError) as caught:
        load(source, **kwargs)
    return str(caught.value)


def sides(pair: Pair) -> tuple[str, str]:
    """The preferred response and the other one."""
    return (pair.response_1, pair.response_2) if pair.human == 1 else (pair.response_2, pair.response_1)
