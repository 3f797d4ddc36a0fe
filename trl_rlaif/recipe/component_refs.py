"""Resolves the components that a recipe names, and validates their options with each component's model."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.checking import report_invalid, wrong_value
from trl_rlaif.recipe.formatting import nearest_or_all
from trl_rlaif.recipe.paths import PathFinder
from trl_rlaif.recipe.sections import ComponentLookup, ComponentRef, Named
from trl_rlaif.recipe.source import KeyPath, Source

# Key of a section -> kind of component, and whether it holds a list of them.
COMPONENT_KEYS: dict[tuple[str, str], tuple[str, bool]] = {
    ("sample", "sampler"): ("pair_sampler", False),
    ("label", "labeler"): ("labeler", False),
    ("reward", "transforms"): ("reward_transform", True),
    ("rl", "labelers"): ("labeler", True),
    ("rl", "transforms"): ("reward_transform", True),
    ("rl", "selectors"): ("data_selector", True),
}
_HOW = "Write 'name', or {name: {option: value}} with the options indented below the name."


def pick_components(section: str, keys: dict[Any, Any], source: Source, finder: PathFinder) -> None:
    """Replace each component named in the section by a ComponentRef, in place.

    Invalid ones are reported and replaced by a placeholder, so that each is reported only once.
    """
    for (owner, key), (kind, many) in COMPONENT_KEYS.items():
        if owner != section:
            continue
        path = (section, key)
        if key == "labeler" and key not in keys:
            keys[key] = "distilled"
        if key == "sampler" and keys.get(key) is None:
            continue
        if not many:
            keys[key] = _component(keys[key], path, kind, source, finder)
        elif key in keys and isinstance(keys[key], list):
            entries = enumerate(keys[key])
            keys[key] = [_component(item, (*path, i), kind, source, finder) for i, item in entries]
        elif key in keys:
            fix = f"Write a list of {_words(kind)}s, for example [name]."
            source.report(path, wrong_value(key, f"section '{section}'", keys[key]), fix)
            keys[key] = []
    if section == "label" and keys.get("criteria"):
        _check_criteria(keys["labeler"].name, source, finder.registry)
    if section == "label" and isinstance(keys.get("compare"), dict):
        keys["compare"] = dict(keys["compare"])
        for name, compared in keys["compare"].items():
            if isinstance(compared, dict) and compared.get("labeler") is not None:
                path = (section, "compare", name, "labeler")
                labeler = _component(compared["labeler"], path, "labeler", source, finder)
                keys["compare"][name] = {**compared, "labeler": labeler}


def _check_criteria(labeler: str, source: Source, registry: ComponentLookup) -> None:
    """Check that the labeler has the option criteria if ``label.criteria`` is set."""

    def takes(name: str) -> bool:
        try:
            return "criteria" in registry.options_model("labeler", name).model_fields
        except UserError:  # an unusable plugin is reported where it is named
            return False

    if labeler in registry.names("labeler") and not takes(labeler):
        fix = f"Use one of {', '.join(filter(takes, registry.names('labeler'))) or 'those that do'}."
        source.report(("label", "criteria"), f"the labeler '{labeler}' asks by no criteria.", fix)


def _component(written: Any, path: KeyPath, kind: str, source: Source, finder: PathFinder) -> ComponentRef:
    where = source.where(path)
    parts = _name_and_options(written)
    if parts is None:
        key = ".".join(map(str, path[1:]))
        what = wrong_value(key, f"section '{path[0]}'", written)
        if isinstance(written, dict) and len(written) > 1:
            found = f"'{key}' in section '{path[0]}' holds {len(written)} keys"
            what = f"{found}, and should name one {_words(kind)}."
        source.report(path, what, _HOW)
        return ComponentRef("", where=where)
    name, options = parts
    try:
        known = finder.registry.names(kind)
        if name not in known:
            fix = nearest_or_all(name, known, "Installed")
            source.report(path, f"there is no {_words(kind)} '{name}'.", fix)
            return ComponentRef(name, where=where)
        model = finder.registry.options_model(kind, name)
    except UserError as error:  # an unusable plugin, which the message names
        for problem in error.problems:
            source.report(path, problem.what, problem.fix)
        return ComponentRef(name, where=where)
    owner = f"the options of {_words(kind)} '{name}'"
    base = (*path, name) if isinstance(written, dict) else path
    if not isinstance(options, dict):
        source.report(base, f"{owner} are not a mapping.", _HOW)
        return ComponentRef(name, where=where)
    try:
        checked = model.model_validate(options, context=finder)
    except ValidationError as error:
        report_invalid(error, model, options, source, base, owner)
        return ComponentRef(name, where=where)
    fields = model.model_fields.items()
    files = tuple(option for option, of in fields if any(isinstance(mark, Named) for mark in of.metadata))
    return ComponentRef(name, checked.model_dump(mode="json", by_alias=True), where, files)


def _name_and_options(written: Any) -> tuple[str, Any] | None:
    if isinstance(written, str) and written:
        return written, {}
    if isinstance(written, dict) and len(written) == 1:
        [(name, options)] = written.items()
        if isinstance(name, str) and name:
            return name, {} if options is None else options
    return None


def _words(kind: str) -> str:
    return kind.replace("_", " ")
