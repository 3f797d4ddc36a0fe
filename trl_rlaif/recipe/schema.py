"""Every key of a recipe as one JSON Schema: for editors, and for ``trl-rlaif explain``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.recipe.component_refs import COMPONENT_KEYS
from trl_rlaif.recipe.ranges import RANGES, Range
from trl_rlaif.recipe.sections import SECTIONS, ComponentLookup, ComponentRef
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES, config_hints, is_refused, strict_hint
from trl_rlaif.recipe.variants import CHANGEABLE
from trl_rlaif.recipe.variants import KEY as VARIANTS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_VARIANTS = "Variants of the recipe, each a name, or a name with the sections that it changes; they are compared."
_REFERENCE = "#/$defs/{model}"
_KINDS = sorted({kind for kind, _ in COMPONENT_KEYS.values()})


def recipe_schema(registry: ComponentLookup, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The JSON Schema of recipes: a document of draft 2020-12.

    It covers single keys. Constraints between keys, and whether files exist, are checked by ``check``.

    Args:
        registry: The installed components.
        defaults: By section, the configuration fields that its stage sets; the recipe's keys take precedence.
    """
    definitions: dict[str, Any] = {}
    properties = {name: _section(name, definitions) for name in SECTIONS}
    properties["rounds"]["anyOf"].append({"type": "integer", "minimum": 1})
    for section, changed in (defaults or {}).items():
        for key, value in changed.items():
            properties[section]["anyOf"][0]["properties"][key]["default"] = value
    for kind in _KINDS:
        definitions[kind] = _components(kind, registry, definitions)
    definitions[ComponentRef.__name__] = {"anyOf": [{"$ref": _REFERENCE.format(model=kind)} for kind in _KINDS]}
    properties[VARIANTS] = {"type": "array", "minItems": 2, "items": _variant(), "description": _VARIANTS}
    return {
        "$schema": _DIALECT,
        "title": "A recipe of trl-rlaif",
        "type": "object",
        "properties": properties,
        "required": ["model", "data"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _variant() -> dict[str, Any]:
    changed = {name: {"type": ["object", "integer", "null"]} for name in CHANGEABLE}  # a partial section
    changes = {"type": ["object", "null"], "properties": changed, "additionalProperties": False}
    named = {"type": "object", "additionalProperties": changes, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"type": "string"}, named]}


def _section(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = SECTIONS[name].model_json_schema(ref_template=_REFERENCE)
    definitions |= schema.pop("$defs", {})
    properties = schema.setdefault("properties", {})
    for (owner, key), (kind, many) in COMPONENT_KEYS.items():
        if owner == name:
            one = {"$ref": _REFERENCE.format(model=kind)}
            kept = {k: properties[key][k] for k in ("default", "description") if k in properties[key]}
            properties[key] = kept | ({"type": "array", "items": one} if many else {"anyOf": [one, {"type": "null"}]})
    if name in CONFIG_CLASSES:
        del properties["config"]
        algorithms = [None, *(key for key, known in ALGORITHMS.items() if known.config)] if name == "rl" else [None]
        for algorithm in reversed(algorithms):  # PPOConfig last, so that its defaults are shown
            properties |= _config(name, algorithm, set(SECTIONS[name].model_fields))
    if name == "run":
        del schema["required"]  # the name defaults to the file's
    return {"anyOf": [schema, {"type": "null"}]}


def _config(section: str, algorithm: str | None, own: set[str]) -> dict[str, Any]:
    """The fields of a section's configuration that a recipe may set."""
    module, name = ALGORITHMS[algorithm].config if algorithm else CONFIG_CLASSES[section]
    config = getattr(importlib.import_module(module), name)
    hints, found = config_hints(section, algorithm), {}
    for field in dataclasses.fields(config):
        if field.init and field.name not in own and not is_refused(section, field.name):
            found[field.name] = _field(field, hints[field.name], name)
    return found


def _field(field: dataclasses.Field, hint: Any, config: str) -> dict[str, Any]:
    try:
        schema = TypeAdapter(strict_hint(hint)).json_schema(ref_template=_REFERENCE)
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        schema = {}
    text = " ".join(str(field.metadata.get("help") or "").split())
    schema["description"] = f"{text} (A field of {config}.)".strip()
    if isinstance(field.default, int | float | str) or field.default is None:
        schema["default"] = field.default
    return schema | _bounds(RANGES.get(field.name))


def _bounds(allowed: Range | None) -> dict[str, float]:
    if allowed is None:
        return {}
    ends = {
        "exclusiveMinimum" if allowed.open_least else "minimum": allowed.least,
        "exclusiveMaximum" if allowed.open_most else "maximum": allowed.most,
    }
    return {key: end for key, end in ends.items() if abs(end) != float("inf")}


def _components(kind: str, registry: ComponentLookup, definitions: dict[str, Any]) -> dict[str, Any]:
    """A component by name, or by name with its options."""
    options = {}
    for name in registry.names(kind):
        model = registry.options_model(kind, name)
        schema = model.model_json_schema(ref_template=_REFERENCE)
        definitions |= schema.pop("$defs", {})
        schema.pop("description", None)  # inherited from the options' base class
        options[name] = {"anyOf": [schema, {"type": "null"}]}
    names = {"enum": [*options]}
    with_options = {"type": "object", "properties": options, "additionalProperties": False, "minProperties": 1}
    return {"anyOf": [names, with_options | {"maxProperties": 1}]}
