"""Plain words for a recipe's values, the expected ones, and probably intended names."""

from __future__ import annotations

import datetime
import difflib
import enum
import json
import math
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SHOWN_LENGTH = 60


def shown(value: Any) -> str:
    """A value in a form recognizable to its author, with its type if that is ambiguous."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 4] + '..."'
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, datetime.date):
        return f"{value} (a date)"
    kind = "list" if isinstance(value, list) else "mapping"
    return f"a {kind}" if value else f"an empty {kind}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{near[0]}'?" if near else ""


def nearest_or_all(name: str, known: Iterable[str], label: str) -> str:
    """Suggest the nearest known name, or if none is near, list all after ``label``."""
    known = list(known)
    return did_you_mean(name, known) or f"{label}: {', '.join(known) or 'none'}."


def how_to_mend(hint: Any, value: Any, metadata: Iterable[Any] = ()) -> str:
    """A sentence with the fix for ``value`` if the type ``hint`` is expected."""
    if isinstance(value, str) and (near := did_you_mean(value, _texts(hint))):
        return near
    wanted = expected(hint, metadata)
    if not wanted:
        return ""
    sentence = f"Write {wanted}."
    if isinstance(value, bool | datetime.date) and "text" in wanted:
        sentence += " Put it in quotes if it is meant as text."
    return sentence


def _texts(hint: Any) -> list[str]:
    """The strings in a type's literals."""
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if isinstance(value, str)]
    if get_origin(hint) is Annotated:
        return _texts(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [text for arg in get_args(hint) for text in _texts(arg)]
    return []


def expected(hint: Any, metadata: Iterable[Any] = ()) -> str:
    """The values that a type allows, in words: ``a whole number of at least 2``. Empty if it allows anything."""
    if get_origin(hint) is Annotated:
        hint, *inner = get_args(hint)
        return expected(hint, [*inner, *metadata])
    metadata = list(metadata)
    limits = _limits(metadata)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _one_of([member.value for member in hint])
    simple = {
        int: "a whole number" + limits, float: "a number" + limits, bool: "true or false", str: "text",
        type(None): "null", None: "null", dict: "a mapping", list: "a list",
    }  # fmt: skip
    if isinstance(hint, type) and hint in simple:
        return simple[hint]
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"a mapping with some of the keys {', '.join(hint.model_fields)}"
    return _expected_compound(hint, metadata)


def _expected_compound(hint: Any, metadata: Iterable[Any]) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _one_of(args)
    if origin in (Union, types.UnionType):
        parts = [expected(arg, metadata) for arg in args]
        return " or ".join(dict.fromkeys(parts)) if all(parts) else ""
    if origin is list:
        return _list_of(expected(args[0]))
    if origin is dict:
        return "a mapping"
    return ""


def _list_of(item: str) -> str:
    return f"a list, each entry {item}" if item else "a list"


def _one_of(values: Iterable[Any]) -> str:
    names = [str(value) if isinstance(value, str) else shown(value) for value in values]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _limits(metadata: Iterable[Any]) -> str:
    """Bounds as words, from pydantic's field metadata."""
    low = high = ""
    for item in _flat(metadata):
        if isinstance(item, annotated_types.Ge):
            low = f"of at least {_number(item.ge)}"
        elif isinstance(item, annotated_types.Gt):
            low = f"above {_number(item.gt)}"
        elif isinstance(item, annotated_types.Le):
            high = f"at most {_number(item.le)}"
        elif isinstance(item, annotated_types.Lt):
            high = f"below {_number(item.lt)}"
    words = " and ".join(part for part in (low, high) if part)
    return f" {words}" if words else ""


def _flat(metadata: Iterable[Any]) -> Iterable[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flat(item.metadata)
        elif isinstance(item, annotated_types.GroupedMetadata):
            yield from item
        else:
            yield item


def _number(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value)
