"""Escapes untrusted text for a terminal: characters that move the cursor, set colors or change text direction."""

from __future__ import annotations

import re

import typer

# Control characters except tab and line feed, line separators, bidirectional marks, and surrogates.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escaped(text: str) -> str:
    r"""The text with every such character as a Python escape sequence: ``\x1b`` for an escape."""
    return _ACTING.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def echo(text: object, *, nl: bool = True, err: bool = False) -> None:
    """Print a text, escaped."""
    typer.echo(escaped(str(text)), nl=nl, err=err)
