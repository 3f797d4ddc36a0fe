"""Converts pydantic's validation errors of a section or an option into readable problems."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from trl_rlaif.recipe.formatting import how_to_mend, nearest_or_all, shown
from trl_rlaif.recipe.source import KeyPath, Source

_UNKNOWN_KEY = {"extra_forbidden", "invalid_key"}
# Error type of ``sections.Named``, whose message and fix are in the context.
_NOT_FOUND = "not_found"
_OWN_MESSAGE = {"value_error", "assertion_error"}
# Errors for which the expected type is not informative: pydantic's message is used.
_NOT_THE_TYPE = {"string_pattern_mismatch", "multiple_of", "too_long", "string_too_long"}


def report_invalid(
    error: ValidationError, model: type[BaseModel], data: Any, source: Source, base: KeyPath, owner: str
) -> None:
    """Report each key that a model rejected.

    Args:
        error: Raised by validating ``data`` with ``model``.
        model: A section's model or a component's options.
        data: The validated data.
        source: Collects the problems.
        base: Key path of ``data`` in the recipe.
        owner: What the keys belong to, for example ``section 'sample'``.
    """
    details = error.errors(include_url=False)
    places = [_walk(data, detail["loc"]) for detail in details]
    not_found = {
        path
        for detail, (path, _) in zip(details, places, strict=True)
        if detail["type"] == _NOT_FOUND and detail["loc"][-1] != "[key]"
    }
    for detail, (path, value) in zip(details, places, strict=True):
        if path in not_found and detail["type"] != _NOT_FOUND:
            continue  # another branch of a union
        # A union reports every branch: with `str | list[str]`, only the 3 in [a, 3] is wrong.
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other, _ in places)
        if deeper and detail["type"] not in {"missing", *_UNKNOWN_KEY}:
            continue
        what, fix = _describe(detail, model, path, value, owner)
        source.report((*base, *path), what, fix)


def _describe(detail: Any, model: type[BaseModel], path: KeyPath, value: Any, owner: str) -> tuple[str, str]:
    kind = detail["type"]
    if kind == "missing":
        absent = (*path, detail["loc"][-1])
        hint, metadata = hint_at(model, absent)
        return f"{owner} lacks the key '{dotted(absent)}'.", how_to_mend(hint, None, metadata)
    if kind in _UNKNOWN_KEY:
        known = keys_at(model, path[:-1], detail["loc"])
        return unknown_key(dotted(path), owner), nearest_or_all(str(path[-1]), known, "Known keys")
    if kind == _NOT_FOUND:
        # If the invalid name is a key, as in {reward: weight}, report the entry that contains it.
        entry = path[:-1] if detail["loc"][-1] == "[key]" else path
        return f"'{dotted(entry)}' in {owner}: {detail['ctx']['what']}", detail["ctx"]["fix"]
    if kind in _OWN_MESSAGE:
        cause = (detail.get("ctx") or {}).get("error")
        fix = _sentence(str(cause) if cause is not None else detail["msg"])
    else:
        hint, metadata = hint_at(model, path)
        fix = "" if kind in _NOT_THE_TYPE else how_to_mend(hint, value, metadata)
        fix = fix or _sentence(detail["msg"])
    if detail["loc"] and detail["loc"][-1] == "[key]":
        return f"the name '{path[-1]}' in {owner} does not fit.", fix
    if not path:
        return f"{owner} does not fit.", fix
    return wrong_value(dotted(path), owner, value), fix


def unknown_key(key: str, owner: str) -> str:
    """The message for a key that does not exist."""
    return f"unknown key '{key}' in {owner}."


def wrong_value(key: str, owner: str, value: Any) -> str:
    """The message for a key with a value of the wrong type or range."""
    return f"'{key}' in {owner} is {shown(value)}."


def dotted(path: Sequence[Any]) -> str:
    """A key path in the notation of ``--set``."""
    return ".".join(map(str, path))


def hint_at(model: Any, path: KeyPath) -> tuple[Any, Iterable[Any]]:
    """The type that a model expects at a key path, and the field's metadata; Any if unknown."""
    hint, metadata = model, ()
    for part in path:
        hint, metadata = _inside(hint, part)
    return hint, metadata


def keys_at(model: Any, path: KeyPath, loc: Sequence[Any] = ()) -> list[str]:
    """The keys that a model allows at a key path; in a tagged union, those of the member whose tag is in ``loc``."""
    hint, _ = hint_at(model, path)
    models = [member for member in _members(hint, loc) if _is_model(member)]
    return [field.alias or name for member in models for name, field in member.model_fields.items()]


def _inside(hint: Any, part: Any) -> tuple[Any, Iterable[Any]]:
    fields = [
        field
        for member in _members(hint)
        if _is_model(member)
        for name, field in member.model_fields.items()
        if part in (name, field.alias)
    ]
    if fields:
        # If several union members have the key, such as a judge's `backend`, the union of their types.
        return reduce(or_, (field.annotation for field in fields)), fields[0].metadata
    for member in _members(hint):
        args = get_args(member)
        if get_origin(member) is dict and args:
            return args[1], ()
        if get_origin(member) is list and args and isinstance(part, int):
            return args[0], ()
    return Any, ()


def _members(hint: Any, loc: Sequence[Any] = ()) -> list[Any]:
    """The members of a union, without annotations; the type itself if it is not a union.

    Args:
        loc: Pydantic's location. If it contains the tag of a member, only members with such a tag count.
    """
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0], loc)
    if get_origin(hint) in (Union, types.UnionType):
        args = get_args(hint)
        named = [arg for arg in args if any(isinstance(m, Tag) and m.tag in loc for m in get_args(arg)[1:])]
        return [member for arg in named or args for member in _members(arg, loc)]
    return [hint]


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _walk(data: Any, loc: Sequence[Any]) -> tuple[KeyPath, Any]:
    """The parts of pydantic's location that are keys of the data, not names of union branches; and the value there."""
    path: KeyPath = ()
    for part in loc:
        in_dict = isinstance(data, dict) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_dict or in_list:
            data = data[part]
            path = (*path, part)
    return path, data


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
