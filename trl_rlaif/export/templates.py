"""The chat template of a reward model that other programs use: what they render is what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The original template as a macro: it sees its own variables, and of these two what it is given.
_AROUND = (
    "%(variables)s{%% macro _conversation(messages, add_generation_prompt) %%}"
    "{{ '' }}%(template)s{{ '' }}{%% endmacro %%}"
    "{%% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %%}"
    "{{ _conversation(messages[:-1], true) + messages[-1]['content'] + %(end)s }}"
    "{%% else %%}{{ _conversation(messages, add_generation_prompt) }}{%% endif %%}"
)


def conversation_template(template: str, end: str, kwargs: Mapping[str, Any]) -> str:
    """A chat template by which a conversation that the assistant ends is rendered as a reward model was trained on it.

    That is the prompt as for a generation, then the response as it is, then the end of its turn, and nothing after it.
    Templates write line breaks there, leave the end to the next turn, or put an empty thinking block before a response,
    and a plain classifier reads its score at the last token.

    Args:
        template: The model's own.
        end: The token that ends a turn.
        kwargs: Variables of the template, which it is to have where a caller sets no other.
    """
    variables = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in kwargs.items()
    )
    whole = template.removesuffix("\n")  # as where it stands alone
    return _AROUND % {"variables": variables, "template": whole, "end": _literal(end)}


def _literal(value: Any) -> str:
    """A value of YAML as an expression of Jinja."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
