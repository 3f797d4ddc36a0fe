"""Encodes the types of configuration fields as JSON, and decodes them without importing their library."""

from __future__ import annotations

import enum
import types
from typing import Any, Literal, Union, get_args, get_origin

_PLAIN: dict[str, Any] = {
    "int": int, "bool": bool, "str": str, "float": float, "none": type(None), "dict": dict, "list": list, "any": Any,
}  # fmt: skip


def coded(hint: Any) -> Any:
    """A type as JSON: an enum by its members' values; ``any`` for a type that YAML cannot represent."""
    for name, plain in _PLAIN.items():
        if hint is plain:
            return name
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ["enum", [member.value for member in hint]]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ["literal", list(args)]
    if origin in (Union, types.UnionType):
        return ["union", [coded(arg) for arg in args]]
    if origin in (list, dict):
        return [origin.__name__, [coded(arg) for arg in args]]
    return "any"


def decoded(code: Any) -> Any:
    """The type encoded by ``coded``; an enum becomes a new one with the same values."""
    if isinstance(code, str):
        return _PLAIN[code]
    kind, parts = code
    if kind == "enum":
        return enum.Enum("Choice", {f"value_{i}": value for i, value in enumerate(parts)})
    if kind == "literal":
        return Literal[tuple(parts)]
    args = tuple(decoded(part) for part in parts)
    return Union[args] if kind == "union" else _PLAIN[kind][args]  # noqa: UP007 - the members are computed
