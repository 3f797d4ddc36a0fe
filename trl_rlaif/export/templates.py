"""The chat template of an exported reward model: other programs render what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The original template as a macro: it sees its own variables, and these two as arguments.
_AROUND = (
    "%(variables)s{%% macro _conversation(messages, add_generation_prompt) %%}"
    "{{ '' }}%(template)s{{ '' }}{%% endmacro %%}"
    "{%% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %%}"
    "{{ _conversation(messages[:-1], true) + messages[-1]['content'] + %(end)s }}"
    "{%% else %%}{{ _conversation(messages, add_generation_prompt) }}{%% endif %%}"
)


def conversation_template(template: str, end: str, kwargs: Mapping[str, Any]) -> str:
    """A chat template that renders a conversation ending with the assistant as in reward model training.

    That is the prompt as for generation, the response unchanged, the end-of-turn token, and nothing after it. Original
    templates may write line breaks there, leave the end token to the next turn, or put an empty thinking block before
    the response, while a plain classifier reads its score at the last token.

    Args:
        template: The model's own template.
        end: The end-of-turn token.
        kwargs: Default values of the template's variables.
    """
    variables = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in kwargs.items()
    )
    whole = template.removesuffix("\n")  # as Jinja does for a whole template
    return _AROUND % {"variables": variables, "template": whole, "end": _literal(end)}


def _literal(value: Any) -> str:
    """A YAML value as a Jinja expression."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
