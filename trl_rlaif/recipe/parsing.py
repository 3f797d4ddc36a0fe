"""From a recipe's file to its typed sections, with every problem in it reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.checking import dotted, report_invalid
from trl_rlaif.recipe.component_refs import pick_components
from trl_rlaif.recipe.cross_checks import check_together
from trl_rlaif.recipe.formatting import did_you_mean, nearest_or_all
from trl_rlaif.recipe.paths import PathFinder, find_recipe, prompt_folder
from trl_rlaif.recipe.sections import (
    SECTIONS,
    ComponentLookup,
    DataSection,
    EvaluateSection,
    LabelSection,
    ModelSection,
    ReportSection,
    RewardSection,
    RlSection,
    RunSection,
    SampleSection,
    SftSection,
    plain,
)
from trl_rlaif.recipe.source import KeyPath, Source, apply_overrides, read_source
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES, take_config
from trl_rlaif.recipe.variants import KEY as VARIANTS
from trl_rlaif.recipe.variants import take_arms

_REQUIRED = ("model", "data")
_FUNCTION = re.compile(r"(?P<place>[^:]+):(?P<name>[A-Za-z_]\w*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# What a prompt folder must hold for ratings.
_RATING_FILES = ("rubric.txt", "rating.jinja", "rating_ending.txt")


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. A stage whose section is None does not run.

    Args:
        source: The file it was read from, absolute.
        places: ``file:line`` (or ``--set ...``) of each key path that was written.
        variants: What the list ``compare`` describes, by name: each the recipe with what the variant changes in it. The
            recipe itself is then what they share, and need not be whole.
    """

    run: RunSection
    model: ModelSection
    data: DataSection
    sft: SftSection | None = None
    sample: SampleSection | None = None
    label: LabelSection | None = None
    reward: RewardSection | None = None
    rl: RlSection | None = None
    evaluate: EvaluateSection | None = None
    report: ReportSection | None = None
    source: Path = field(default=Path(), compare=False)
    places: Mapping[KeyPath, str] = field(default_factory=dict, compare=False, repr=False)
    variants: Mapping[str, Recipe] = field(default_factory=dict)

    def line(self, key_path: KeyPath) -> str:
        """``file:line`` of a key such as ``("rl", "kl_coef")``, or of what is nearest around it."""
        return Source(self.source, str(self.source), {}, dict(self.places)).where(key_path)

    def to_dict(self) -> dict[str, Any]:
        """All sections with their defaults and absolute paths, as a recipe that parses to the same again."""
        own = self._sections()
        if self.variants:
            own[VARIANTS] = [
                {name: _changes(self._sections(), variant._sections())} for name, variant in self.variants.items()
            ]
        return own

    def _sections(self) -> dict[str, Any]:
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {name: plain(section) for name, section in sections.items() if section is not None}


def _changes(own: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """The sections in which a variant is another recipe; None where it lacks one."""
    return {name: variant.get(name) for name in SECTIONS if variant.get(name) != own.get(name)}


def parse_recipe(recipe: str | Path, *, overrides: Sequence[str] = (), registry: ComponentLookup) -> Recipe:
    """Read and check a recipe without loading a model.

    A section that is written and left empty (``report:``) is present with its defaults. An override
    ``rl=null`` removes the section. Relative paths are looked up beside the recipe, then in the current
    folder, then among the packaged recipes.

    Args:
        recipe: A path, or the name of a packaged recipe.
        overrides: ``key.path=value`` each, the value in YAML; list entries by index (``a.0.b=1``).
        registry: The components that are installed.

    Raises:
        UserError: With every problem of the recipe, by line. A file that is not plain YAML is reported
            before its contents are looked at.
    """
    path, label = find_recipe(recipe)
    source = read_source(path, label)
    apply_overrides(source, overrides)
    variants = take_arms(source)
    if variants and "evaluate" not in source.data:
        source.report((), f"'{VARIANTS}' needs 'evaluate': its judge and its prompts.", "Add 'evaluate'.")
    sections = _Reader(source, registry).sections()
    whole = {}
    for name, variant in variants.items():
        parts = _Reader(variant, registry).sections()
        check_together(variant)
        known = set(source.problems)
        source.problems += [
            replace(p, what=f"in the variant '{name}': {p.what}") for p in variant.problems if p not in known
        ]
        whole[name] = Recipe(**parts, source=path, places=variant.places)
    if not variants:
        check_together(source)
    if source.problems:
        raise UserError.from_problems(source.in_order())
    return Recipe(**sections, source=path, places=source.places, variants=whole)


class _Reader:
    """Reads each section: components and paths first, then the section's model checks the rest."""

    def __init__(self, source: Source, registry: ComponentLookup) -> None:
        self.source = source
        self.registry = registry
        self.finder = PathFinder.beside(source.path)

    def sections(self) -> dict[str, Any]:
        """The sections that are present; what is wrong is reported to the source."""
        data = self.source.data
        for name in data:
            if name not in SECTIONS:
                fix = nearest_or_all(str(name), SECTIONS, "Known sections")
                self.source.report((name,), f"unknown section '{name}'.", fix)
        for name in _REQUIRED:
            if name not in data:
                self.source.report((), f"the section '{name}' is missing.", f"Add '{name}:' with its keys.")
        present = {name for name in SECTIONS if name in data} | {"run"}
        return {name: self._section(name, data.get(name)) for name in SECTIONS if name in present}

    def _section(self, name: str, written: Any) -> Any:
        keys = {} if written is None else written
        if not isinstance(keys, dict):
            fix = "Write its keys below it, indented."
            self.source.report((name,), f"section '{name}' is {_kind(keys)}, not a mapping.", fix)
            return None
        keys = dict(keys)
        if name == "run":
            keys.setdefault("name", _name_from(self.source.path))
        self._resolve_paths(name, keys)
        pick_components(name, keys, self.source, self.registry)
        if name in CONFIG_CLASSES:
            take_config(name, keys, self.source)
        model = SECTIONS[name]
        try:
            return model.model_validate(keys)
        except ValidationError as error:
            report_invalid(error, model, keys, self.source, (name,), f"section '{name}'")
            return None

    def _resolve_paths(self, section: str, keys: dict[Any, Any]) -> None:
        """Replace paths by absolute ones, in place."""
        find = self.finder
        if section == "model":
            self._resolve(keys, "path", find.model, (section,))
        elif section == "data":
            for key in ("prompts", "eval_prompts", "pairs"):
                self._resolve(keys, key, find.data, (section,))
        elif section == "sft":
            self._resolve(keys, "data", find.data, (section,))
        elif section == "reward":
            self._resolve_list(keys, "policies", self._policy, section)
        elif section == "rl":
            self._resolve_list(keys, "rewards", self._reward, section)
            self._resolve(keys, "rehearsal", find.data, (section,))
        elif section in ("label", "evaluate"):
            self._resolve_judge(keys, (section,))
            self._resolve(keys, "calibration", find.data, (section,))
            self._resolve(keys, "harmless", self._rating_prompt, (section,))
            for key in ("compare", "judges"):
                if isinstance(keys.get(key), dict):
                    keys[key] = dict(keys[key])
                    for name, further in keys[key].items():
                        if isinstance(further, dict):
                            keys[key][name] = dict(further)
                            self._resolve_judge(keys[key][name], (section, key, name))
            if isinstance(keys.get("sets"), dict):
                keys["sets"] = dict(keys["sets"])
                for name in keys["sets"]:
                    self._resolve(keys["sets"], name, find.data, (section, "sets"))

    def _resolve_list(self, keys: dict[Any, Any], key: str, find: Callable[[str], str], section: str) -> None:
        if isinstance(keys.get(key), list):
            keys[key] = list(keys[key])
            for index, entry in enumerate(keys[key]):
                if isinstance(entry, dict) and len(entry) == 1:  # a name with a weight
                    [(name, weight)] = entry.items()
                    holder = {index: name}
                    self._resolve(holder, index, find, (section, key))
                    keys[key][index] = {holder[index]: weight}
                else:
                    self._resolve(keys[key], index, find, (section, key))

    def _resolve_judge(self, keys: dict[Any, Any], path: KeyPath) -> None:
        """A judge's prompt folder and model; a model on a server is no path."""
        self._resolve(keys, "prompt", self.finder.prompt, path)
        if isinstance(keys.get("judge"), dict):
            keys["judge"] = dict(keys["judge"])
            if keys["judge"].get("backend") != "openai":
                self._resolve(keys["judge"], "path", self.finder.model, (*path, "judge"))

    def _resolve(self, holder: Any, key: Any, find: Callable[[str], str], path: KeyPath) -> None:
        value = holder[key] if isinstance(holder, list) else holder.get(key)
        if not isinstance(value, str) or not value:
            return  # absent, or of a type that the section's model reports
        try:
            holder[key] = find(value)
        except UserError as error:
            for problem in error.problems:
                what = f"'{dotted((*path[1:], key))}' in section '{path[0]}': {problem.what}"
                self.source.report((*path, key), what, problem.fix)

    def _rating_prompt(self, name: str) -> str:
        """A prompt that the labeler ``direct`` rates with."""
        if "direct" not in self.registry.names("labeler"):
            raise UserError("ratings come from the labeler 'direct', and none of that name is installed.")
        found = self.finder.prompt(name)
        missing = [part for part in _RATING_FILES if not (prompt_folder(found) / part).is_file()]
        if missing:
            raise UserError(f"the prompt '{name}' has no file {missing[0]}, which ratings need.")
        return found

    def _policy(self, name: str) -> str:
        """An entry of ``reward.policies``."""
        return name if name == "base" else self.finder.model(name)

    def _reward(self, name: str) -> str:
        """A reward of ``rl.rewards``; a .py file in it becomes absolute. Nothing is imported."""
        if name == "direct" and name not in self.registry.names("labeler"):
            raise UserError("'direct' is a labeler, and none of that name is installed.")
        if name in ("reward", "direct"):
            return name
        match = _FUNCTION.fullmatch(name)
        if match and match["place"].endswith(".py"):
            return f"{self.finder.code(match['place'])}:{match['name']}"
        if match and _MODULE.fullmatch(match["place"]):
            return name
        near = did_you_mean(name, ["reward", "direct"])
        raise UserError(
            f"'{name}' is no reward.",
            fix=near or "Write reward, direct, package.module:function or path/to/file.py:function.",
        )


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"


def _name_from(path: Path) -> str:
    """A run's name from its recipe's file, with what a folder's name should not hold replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:100]
    return name or "run"
