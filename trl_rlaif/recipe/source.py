"""Reads a recipe's text as plain data with the line of every key, and applies ``--set`` overrides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif.errors import Problem, UserError

MAX_BYTES = 1_000_000
MAX_NODES = 100_000

KeyPath = tuple[Any, ...]

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "timestamp")}


@dataclass
class Source:
    """Plain data, the place of each key, and the problems found so far.

    Args:
        path: The recipe's file.
        label: The file's name as the user wrote it, for messages.
        data: The recipe as dicts, lists and scalars; no object is shared.
        places: ``file:line`` of each key path, or ``--set a.b=c`` if an override set it.
    """

    path: Path
    label: str
    data: dict[Any, Any]
    places: dict[KeyPath, str]
    problems: list[Problem] = field(default_factory=list)

    def where(self, key_path: Sequence[Any] = ()) -> str:
        """The place of a key, or of its nearest parent that was written."""
        path = tuple(key_path)
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, f"{self.label}:1")

    def report(self, key_path: Sequence[Any], what: str, fix: str = "") -> None:
        """Note a problem with a key."""
        self.problems.append(Problem(what, self.where(key_path), fix))

    def in_order(self) -> list[Problem]:
        """The distinct problems by line, those of overrides last."""

        def order(problem: Problem) -> tuple[int, int]:
            if not problem.where.startswith(f"{self.label}:"):
                return (1, 0)
            return (0, int(problem.where[len(self.label) + 1 :].split(":")[0]))

        return sorted(dict.fromkeys(self.problems), key=order)


def read_source(path: Path, label: str) -> Source:
    """Read a recipe's file as safe YAML.

    Raises:
        UserError: The file cannot be read, is not UTF-8, is not valid and plain YAML, is too large, or does not contain
            a mapping. Duplicate keys do not raise; they are reported in the result.
    """
    text = _read_text(path, label)

    def place(mark: yaml.Mark) -> str:
        return f"{label}:{mark.line + 1}"

    data, places, problems = _read_yaml(text, place, label)
    if data is None and set(places) <= {()}:
        raise UserError("the recipe is empty.", where=f"{label}:1", fix="Write at least model, data and one stage.")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise UserError(
            f"the recipe is {kind}.",
            where=places[()],
            fix="Write its sections as keys, for example 'model:'.",
        )
    return Source(path, label, data, places, problems)


def _read_text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"the recipe cannot be read: {error.strerror}.", where=label) from None
    if len(content) > MAX_BYTES:
        raise UserError(
            f"the recipe is larger than {MAX_BYTES:,} bytes.",
            where=label,
            fix="Keep data in separate files.",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError("this line is not UTF-8.", where=f"{label}:{line}", fix="Save as UTF-8.") from None


def _read_yaml(
    text: str, place: Callable[[yaml.Mark], str], label: str
) -> tuple[Any, dict[KeyPath, str], list[Problem]]:
    """Data, places and problems of one YAML document; ``label`` names the text in a syntax error."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        builder = _Builder(loader, place)
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        builder.count(node, {})
        data = builder.build(node, ())
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, label, place) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{label}:{line}" if not label.startswith("--set ") else label
        raise UserError("this line contains a character that YAML does not allow.", where=where) from None
    except RecursionError:
        raise UserError("the YAML is nested too deeply.", where=label) from None
    finally:
        if loader is not None:
            loader.dispose()
    if builder.fatal:
        raise UserError.from_problems([*builder.fatal, *builder.problems])
    return data, builder.places, builder.problems


def _syntax_error(error: yaml.MarkedYAMLError, label: str, place: Callable[[yaml.Mark], str]) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = label
    if mark is not None:
        where = place(mark)
        where += f":{mark.column + 1}" if where.startswith(f"{label}:") else ""
    detail = f"{error.problem or 'it cannot be read'}"
    detail += f" ({error.context})" if error.context else ""
    fix = "Indent with spaces, not with tabs." if "'\\t'" in detail else ""
    return UserError(f"this is not valid YAML: {detail}.", where=where, fix=fix)


class _Builder:
    """Converts composed YAML nodes to plain data, recording the place of every key path.

    Every alias is expanded into a separate copy, so that an override changes only one place.
    """

    def __init__(self, loader: yaml.SafeLoader, place: Callable[[yaml.Mark], str]) -> None:
        self.loader = loader
        self.place = place
        self.places: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self.fatal: list[Problem] = []

    def count(self, node: yaml.Node, known: dict[int, int | None]) -> int:
        """Number of nodes in the expanded tree; rejects aliases that explode or contain themselves."""
        if id(node) in known:
            total = known[id(node)]
            if total is None:
                raise UserError("an alias contains itself.", where=self.place(node.start_mark))
            return total
        known[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            total += sum(self.count(key, known) + self.count(value, known) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(self.count(value, known) for value in node.value)
        if total > MAX_NODES:
            raise UserError(
                f"the recipe contains more than {MAX_NODES:,} values once its aliases are expanded.",
                where=self.place(node.start_mark), fix="Write it without nested aliases.",
            )  # fmt: skip
        known[id(node)] = total
        return total

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The node as plain data."""
        self.places.setdefault(path, self.place(node.start_mark))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALAR_TAGS:
            return self._scalar(node)
        tag = node.tag.replace(_TAG, "!!")
        self._refuse(node, f"the YAML tag '{tag}' is not allowed.", "Write a plain value.")
        return None

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError, ArithmeticError, AttributeError):  # raised by PyYAML's constructors
            self._refuse(node, "this value cannot be read.", "Put it in quotes if it is meant as text.")
            return None
        if isinstance(value, int) and value.bit_length() > 64:
            self._refuse(node, "this number is too large.", "Put it in quotes if it is meant as text.")
            return None
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        entries: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[tuple[Any, yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += self._merged(value_node)
                continue
            key = self._key(key_node)
            if key in entries:
                first = entries[key][0].start_mark.line + 1
                what = f"the key '{key}' is written twice; the first is in line {first}."
                self.problems.append(Problem(what, self.place(key_node.start_mark), "Remove one of them."))
            entries[key] = (key_node, value_node)
        for key, key_node, value_node in merged:
            entries.setdefault(key, (key_node, value_node))
        data = {}
        for key, (key_node, value_node) in entries.items():
            self.places[(*path, key)] = self.place(key_node.start_mark)
            data[key] = self.build(value_node, (*path, key))
        return data

    def _merged(self, node: yaml.Node) -> list[tuple[Any, yaml.Node, yaml.Node]]:
        """Entries merged by ``<<``; the first of several with the same key counts, as YAML requires."""
        if isinstance(node, yaml.SequenceNode):
            return [entry for item in node.value for entry in self._merged(item)]
        if not isinstance(node, yaml.MappingNode) or node.tag != _TAG + "map":
            self._refuse(node, "'<<' is not followed by a plain mapping.", "Write '<<: *name'.")
            return []
        own, nested = [], []
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                nested += self._merged(value)
            else:
                own.append((self._key(key), key, value))
        return own + nested

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, "a list or mapping is used as a key.", "Use a name as the key.")
            return None
        return self.build(node, ())

    def _refuse(self, node: yaml.Node, what: str, fix: str) -> None:
        self.fatal.append(Problem(what, self.place(node.start_mark), fix))


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Apply each ``a.b=value`` to the source in turn; malformed ones are reported as problems."""
    for override in overrides:
        label = f"--set {override}"
        try:
            _apply(source, override, label)
        except UserError as error:
            source.problems += [Problem(p.what, label, p.fix) for p in error.problems]


def _apply(source: Source, override: str, label: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError("this is not key.path=value.", fix="Write for example --set sample.temperature=0.9.")
    if not text.strip():
        raise UserError("the value is missing.", fix="Write null, '' or {} if it is meant to be empty.")
    value, inside, problems = _read_yaml(text, lambda mark: label, label)
    source.problems += problems
    container, path = _container(source, parts, label)
    last = _entry(container, parts[-1], path)
    for place in [place for place in source.places if place[: len(path) + 1] == (*path, last)]:
        del source.places[place]
    if value is None and not path:
        source.data.pop(last, None)
        return
    # Including the keys inside, or a stage would not be redone when one of them changes.
    source.places |= {(*path, last, *key): label for key in {(), *inside}}
    container[last] = value


def _container(source: Source, parts: list[str], label: str) -> tuple[Any, KeyPath]:
    """The dict or list that contains the last part, created if absent, and its key path."""
    current: Any = source.data
    path: KeyPath = ()
    for part in parts[:-1]:
        entry = _entry(current, part, path)
        if isinstance(current, dict) and current.get(entry) is None:
            current[entry] = {}
            source.places.setdefault((*path, entry), label)
        current = current[entry]
        path = (*path, entry)
        if not isinstance(current, dict | list):
            name = ".".join(map(str, path))
            raise UserError(f"'{name}' is a single value and has no keys.", fix=f"Set '{name}' as a whole.")
    return current, path


def _entry(container: Any, part: str, path: KeyPath) -> Any:
    """The key or the list index that ``part`` denotes."""
    if isinstance(container, dict):
        return part
    if part.isascii() and part.isdigit() and int(part) < len(container):
        return int(part)
    name = ".".join(map(str, path))
    count = len(container)
    fix = f"Write an index from 0 to {count - 1}." if count else f"Set '{name}' as a whole."
    raise UserError(f"'{part}' is not an index into '{name}', a list of {count}.", fix=fix)
