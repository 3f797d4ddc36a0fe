"""The variants of a comparison: expands a recipe's list ``compare`` into separate recipes."""

from __future__ import annotations

import copy
from typing import Any

from trl_rlaif.recipe.formatting import nearest_or_all
from trl_rlaif.recipe.sections import safe_name
from trl_rlaif.recipe.source import KeyPath, Source

KEY = "compare"

# Sections that a variant may change. All share the initial policy, the seed and the evaluation, to be comparable.
CHANGEABLE = ("data", "rounds", "sample", "label", "reward", "rl")
_EVALUATED = "eval_prompts"
# Name of the initial policy in the comparison.
START = "start"
_HOW = "Write a name, or {name: {section: {key: value}}} with what differs from the recipe itself."


def take_arms(source: Source) -> dict[str, Source]:
    """Remove ``compare`` from a recipe's source, and return each variant's source by name; problems are reported.

    A variant is the recipe without ``compare``, overlaid with the variant's keys: a mapping is merged, anything else is
    replaced, and a section that a variant sets to null is removed. Places still refer to where a key was written.
    """
    if KEY not in source.data:
        return {}
    written = source.data.pop(KEY)
    if not isinstance(written, list) or len(written) < 2:
        source.report((KEY,), f"'{KEY}' is not a list of two or more variants.", _HOW)
        return {}
    variants: dict[str, Source] = {}
    for index, entry in enumerate(written):
        path = (KEY, index)
        name, changes = _entry(entry)
        problem = _problem(name, variants)
        if problem:
            source.report(path, problem, _HOW)
            continue
        variant = Source(source.path, source.label, copy.deepcopy(source.data), dict(source.places))
        _lay_over(source, variant, changes, (*path, name))
        variants[name] = variant
    return variants


def _entry(entry: Any) -> tuple[Any, Any]:
    """A variant's name and its changes."""
    if isinstance(entry, dict) and len(entry) == 1:
        name, changes = next(iter(entry.items()))
        return name, {} if changes is None else changes
    return entry, {}


def _problem(name: Any, known: dict[str, Source]) -> str:
    if not isinstance(name, str):
        return f"a variant of '{KEY}' has no name."
    if name in known:
        return f"two variants of '{KEY}' are called '{name}'."
    if name == START:
        return f"a variant of '{KEY}' is called '{START}'; this is the starting policy's own name."
    try:
        safe_name(name)
    except ValueError as error:
        return f"'{name}' is no name for a variant. {error}"
    return ""


def _lay_over(source: Source, variant: Source, changes: Any, path: KeyPath) -> None:
    """Overlay a variant's changes on its data, and their places on its places."""
    if not isinstance(changes, dict):
        source.report(path, f"the variant '{path[-1]}' has no sections.", _HOW)
        return
    for section, keys in changes.items():
        if section not in CHANGEABLE:
            fix = nearest_or_all(str(section), CHANGEABLE, "A variant may change")
            source.report((*path, section), f"the variant '{path[-1]}' changes '{section}'.", fix)
        elif keys is None:
            variant.data.pop(section, None)
            _forget(variant, (section,))
        elif section == "data" and isinstance(keys, dict) and _EVALUATED in keys:
            what = (
                f"the variant '{path[-1]}' changes 'data.{_EVALUATED}', but all variants must answer the same prompts."
            )
            source.report((*path, section, _EVALUATED), what, "Write it in the recipe's own 'data'.")
        else:
            _merge(source, variant, variant.data, section, keys, (section,), (*path, section))


def _merge(source: Source, variant: Source, holder: dict, key: Any, value: Any, to: KeyPath, where: KeyPath) -> None:
    if isinstance(value, dict) and isinstance(holder.get(key), dict):
        variant.places[to] = source.where(where)
        for inner, item in value.items():
            _merge(source, variant, holder[key], inner, item, (*to, inner), (*where, inner))
        return
    _forget(variant, to)
    holder[key] = copy.deepcopy(value)
    for place, line in source.places.items():
        if place[: len(where)] == where:
            variant.places[(*to, *place[len(where) :])] = line


def _forget(variant: Source, path: KeyPath) -> None:
    for place in [place for place in variant.places if place[: len(path)] == path]:
        del variant.places[place]
