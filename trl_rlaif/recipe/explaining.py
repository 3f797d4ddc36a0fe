"""Explains a recipe key: meaning, allowed values and default, in words."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.formatting import nearest_or_all

_WIDTH = 100
_ENDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Args:
        name: Without its parent keys.
        type: Type and range, in words.
        default: As JSON; empty if there is none.
        description: One line; may be empty.
    """

    name: str
    type: str
    default: str
    description: str

    def lines(self, indent: str = "") -> list[str]:
        """The lines that ``explain`` prints."""
        default = f", default {self.default}" if self.default else ""
        wrap = {"initial_indent": f"{indent}  ", "subsequent_indent": f"{indent}  "}
        return [f"{indent}{self.name}: {self.type}{default}", *textwrap.wrap(self.description, _WIDTH, **wrap)]


def explain(schema: dict[str, Any], key: str) -> str:
    """A key with its type, default and description, and its subkeys.

    Args:
        schema: Result of ``recipe_schema``.
        key: ``rl.kl_coef``; a section; or an option of a component, ``rl.transforms.advantage.margin``.

    Raises:
        UserError: The key does not exist; the message names the nearest.
    """
    lines = _key(key, _find(schema, key), schema).lines()
    for below in keys_below(schema, key):
        lines += ["", *below.lines("  ")]
    return "\n".join(lines)


def keys_below(schema: dict[str, Any], key: str) -> list[Key]:
    """The subkeys of a key; of "", the sections. Arguments and errors as in ``explain``."""
    return [_key(name, child, schema) for name, child in _below(_find(schema, key), schema)]


def _find(schema: dict[str, Any], key: str) -> dict[str, Any]:
    node = schema
    for part in key.split(".") if key else []:
        below = dict(_below(node, schema))
        if part not in below:
            fix = nearest_or_all(part, sorted(below), "Known here")
            raise UserError(f"there is no key '{part}' in '{key}'.", fix=fix if below else "It has no keys below it.")
        node = below[part]
    return node


def _key(name: str, node: dict[str, Any], schema: dict[str, Any]) -> Key:
    default = json.dumps(node["default"]) if "default" in node else ""
    return Key(name, _type(node, schema), default, _description(node, schema))


def _alternatives(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a value's schema, with references resolved."""
    if "$ref" in node:
        yield from _alternatives(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    elif branches := node.get("anyOf") or node.get("oneOf"):
        for branch in branches:
            yield from _alternatives(branch, schema)
    else:
        yield node


def _below(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The distinct keys of a value, or of the entries of a list."""
    found: dict[str, dict[str, Any]] = {}
    for choice in _alternatives(node, schema):
        for name, child in choice.get("properties", {}).items():
            known = found.setdefault(name, child)
            values = known.get("enum") or [known.get("const")]
            if None not in values and child.get("const", values[0]) not in values:
                # The discriminator of a union, such as a judge's backend.
                found[name] = {**known, "enum": [*values, child["const"]]}
        if "items" in choice:
            found = dict(_below(choice["items"], schema)) | found
    yield from found.items()


def _type(node: dict[str, Any], schema: dict[str, Any]) -> str:
    words = []
    for choice in _alternatives(node, schema):
        if "enum" in choice:
            words += [json.dumps(value) if not isinstance(value, str) else f"'{value}'" for value in choice["enum"]]
        elif "const" in choice:
            words.append(f"'{choice['const']}'")
        elif choice.get("type") == "array":
            words.append(f"list of ({_type(choice.get('items', {}), schema)})")
        elif "type" in choice:
            types = choice["type"] if isinstance(choice["type"], list) else [choice["type"]]
            words += [_word(name) + _ends({**node, **choice}) * (name in ("integer", "number")) for name in types]
    return " or ".join(dict.fromkeys(words)) or "any value"


def _word(name: str) -> str:
    return {"object": "keys", "string": "text", "boolean": "true or false"}.get(name, name)


def _ends(choice: dict[str, Any]) -> str:
    said = [f" {words} {json.dumps(choice[end])}" for end, words in _ENDS.items() if end in choice]
    return " and".join(said)


def _description(node: dict[str, Any], schema: dict[str, Any]) -> str:
    found = node.get("description") or next(
        (c["description"] for c in _alternatives(node, schema) if "description" in c), ""
    )
    return " ".join(found.replace("``", "'").split())
