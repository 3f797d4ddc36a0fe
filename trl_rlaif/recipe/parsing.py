"""Parses a recipe file into its typed sections, reporting all problems at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.checking import report_invalid
from trl_rlaif.recipe.component_refs import pick_components
from trl_rlaif.recipe.cross_checks import check_together
from trl_rlaif.recipe.formatting import nearest_or_all
from trl_rlaif.recipe.paths import PathFinder, find_recipe
from trl_rlaif.recipe.sections import (
    SECTIONS,
    ComponentLookup,
    ComponentRef,
    DataSection,
    EvaluateSection,
    LabelSection,
    ModelSection,
    ReportSection,
    RewardSection,
    RlSection,
    RoundsSection,
    RunSection,
    SampleSection,
    SftSection,
    TeachingSection,
    plain,
)
from trl_rlaif.recipe.source import KeyPath, Source, apply_overrides, read_source
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES, take_config
from trl_rlaif.recipe.variants import KEY as VARIANTS
from trl_rlaif.recipe.variants import take_arms

_REQUIRED = ("model", "data")
_ROUNDS = "rounds"
# Decides which of two responses wins, in evaluate, compare and the forgetting tracker: both orders, the mean of their
# log-odds, no rationales. The options of the section label do not apply: with an ablation there, such as a single
# order, a judge with a position bias could produce a win rate of 100%.
WHO_WINS = ComponentRef("distilled", {"orders": "both", "debias": "mean_logit"})


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. A stage whose section is None does not run.

    Args:
        source: Absolute path of its file.
        places: ``file:line`` (or ``--set ...``) of each key path in it.
        variants: The variants in the list ``compare``, by name: each is the recipe with the variant's changes. The
            recipe itself then holds what they share, and need not be complete.
    """

    run: RunSection
    model: ModelSection
    data: DataSection
    sft: SftSection | None = None
    sample: SampleSection | None = None
    judge: TeachingSection | None = None
    label: LabelSection | None = None
    reward: RewardSection | None = None
    rl: RlSection | None = None
    evaluate: EvaluateSection | None = None
    report: ReportSection | None = None
    rounds: RoundsSection | None = None
    source: Path = field(default=Path(), compare=False)
    places: Mapping[KeyPath, str] = field(default_factory=dict, compare=False, repr=False)
    variants: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def previous(self) -> str | None:
        """The folder of the run that this one continues from."""
        return self.rounds.previous if self.rounds else None

    @property
    def evaluation_prompt(self) -> str:
        """Name or folder of the prompt for the main judge of ``evaluate``; default: that of ``label``."""
        return self.evaluate.prompt or (self.label.prompt if self.label else "general")

    @property
    def teaching_prompt(self) -> str:
        """Name or folder of the prompt that ``judge`` teaches the judge to answer; default: that of ``label``."""
        return self.judge.prompt or (self.label.prompt if self.label else "general")

    @property
    def teaching_labeler(self) -> ComponentRef:
        """The labeler whose questions the judge is taught."""
        return self.label.labeler if self.label else ComponentRef("distilled")

    def deciding_labeler(self, judge: Any) -> ComponentRef:
        """The labeler with which a judge named in ``evaluate`` decides which of two responses wins. A taught judge uses
        the labeler that it was taught: teaching ratings does not improve comparisons."""
        taught = self.teaching_labeler if judge == "taught" else WHO_WINS
        return WHO_WINS if taught.name == WHO_WINS.name else taught

    @property
    def reward_labelers(self) -> dict[str, ComponentRef]:
        """The labelers among the rewards of ``rl``, by name, with their options from ``rl.labelers`` or ``label``."""
        if self.rl is None:
            return {}
        known = [*self.rl.labelers, *([self.label.main_labeler] if self.label else [])]
        options = {ref.name: ref.options for ref in reversed(known)}
        found = {}
        for i, name in enumerate(self.rl.reward_names):
            if name != "reward" and ":" not in name:
                found[name] = ComponentRef(name, options.get(name, {}), self.line(("rl", "rewards", i)))
        return found

    def asks_taught(self, *sections: str) -> bool:
        """Whether any of the sections (of ``label``, ``rl``, ``evaluate``) uses the judge taught by the stage judge."""
        label, evaluate = self.label, self.evaluate
        asked: list[Any] = []
        if "label" in sections and label:
            asked += [label.judge, *(compared.judge for compared in label.compare.values())]
        if "rl" in sections and label and self.reward_labelers:
            asked.append(label.judge)
        if "evaluate" in sections and evaluate:
            asked += [evaluate.judge, *(further.judge for further in evaluate.judges.values())]
        return "taught" in asked

    def line(self, key_path: KeyPath) -> str:
        """``file:line`` of a key such as ``("rl", "kl_coef")``, or of its nearest parent in the file."""
        return Source(self.source, str(self.source), {}, dict(self.places)).where(key_path)

    def to_dict(self) -> dict[str, Any]:
        """All sections with defaults and absolute paths, as a recipe that parses to the same result."""
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
    """The sections in which a variant differs from the recipe; None for a section that it lacks."""
    return {name: variant.get(name) for name in SECTIONS if variant.get(name) != own.get(name)}


def parse_recipe(recipe: str | Path, *, overrides: Sequence[str] = (), registry: ComponentLookup) -> Recipe:
    """Read and check a recipe without loading a model.

    An empty section (``report:``) is present with its defaults. An override ``rl=null`` removes the section. Relative
    paths are resolved against the recipe's folder, then the current folder, then the packaged recipes.

    Args:
        recipe: A path, or the name of a packaged recipe.
        overrides: ``key.path=value`` each, the value in YAML; list entries by index (``a.0.b=1``).
        registry: The installed components.

    Raises:
        UserError: With every problem of the recipe, by line. A file that is not plain YAML is reported before its
            contents are checked.
    """
    path, label = find_recipe(recipe)
    source = read_source(path, label)
    apply_overrides(source, overrides)
    variants = take_arms(source)
    if variants and "evaluate" not in source.data:
        source.report((), f"'{VARIANTS}' needs 'evaluate': its judge and its prompts.", "Add 'evaluate'.")
    sections = _Reader(source, registry).sections()
    evaluate = sections.get("evaluate")
    if variants and evaluate and "taught" in (evaluate.judge, *(further.judge for further in evaluate.judges.values())):
        what = f"'{VARIANTS}' needs the same judge for all variants, but each variant teaches its own."
        source.report(("evaluate",), what, "Name the folder judge/ of another run as the judge's path.")
    whole = {}
    for name, variant in variants.items():
        parts = _Reader(variant, registry).sections()
        check_together(variant)
        known = set(source.problems)
        source.problems += [
            replace(p, what=f"in the variant '{name}': {p.what}") for p in variant.problems if p not in known
        ]
        if not source.problems:
            whole[name] = Recipe(**parts, source=path, places=variant.places)
    if not variants:
        check_together(source)
    if source.problems:
        raise UserError.from_problems(source.in_order())
    return Recipe(**sections, source=path, places=source.places, variants=whole)


class _Reader:
    """Parses each section: first its components, then the section's model resolves paths and validates the rest."""

    def __init__(self, source: Source, registry: ComponentLookup) -> None:
        self.source = source
        self.finder = PathFinder.beside(source.path, registry)

    def sections(self) -> dict[str, Any]:
        """The sections that are present; problems are reported to the source."""
        data = self.source.data
        self._spell_out_rounds()
        for name in data:
            if name not in SECTIONS:
                fix = nearest_or_all(str(name), SECTIONS, "Known sections")
                self.source.report((name,), f"unknown section '{name}'.", fix)
        for name in _REQUIRED:
            if name not in data:
                self.source.report((), f"the section '{name}' is missing.", f"Add '{name}:' with its keys.")
        present = {name for name in SECTIONS if name in data} | {"run"}
        found = {name: self._section(name, data.get(name)) for name in SECTIONS if name in present}
        if (rounds := found.get("rounds")) and not rounds.repeats:
            del found["rounds"]  # a single round is a plain run
        return found

    def _spell_out_rounds(self) -> None:
        """Expand ``rounds: 3`` to ``rounds: {number: 3}``."""
        written = self.source.data.get(_ROUNDS)
        if type(written) is int:
            self.source.data[_ROUNDS] = {"number": written}
            self.source.places[_ROUNDS, "number"] = self.source.where((_ROUNDS,))

    def _section(self, name: str, written: Any) -> Any:
        keys = {} if written is None else written
        if not isinstance(keys, dict):
            fix = "Write its keys below it, indented."
            self.source.report((name,), f"section '{name}' is {_kind(keys)}, not a mapping.", fix)
            return None
        keys = dict(keys)
        if name == "run":
            keys.setdefault("name", _name_from(self.source.path))
        pick_components(name, keys, self.source, self.finder)
        if name in CONFIG_CLASSES:
            take_config(name, keys, self.source)
        model = SECTIONS[name]
        try:
            return model.model_validate(keys, context=self.finder)
        except ValidationError as error:
            report_invalid(error, model, keys, self.source, (name,), f"section '{name}'")
            return None


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"


def _name_from(path: Path) -> str:
    """A run's name from its recipe's file name, with characters unsuitable for a folder name replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:100]
    return name or "run"
