"""Resolves the paths of recipes, data, models and prompts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl_rlaif.errors import UserError
from trl_rlaif.recipe.formatting import did_you_mean

if TYPE_CHECKING:
    from trl_rlaif.recipe.sections import ComponentLookup

_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILE_ENDINGS = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst",
    ".zip", ".yaml", ".yml", ".py", ".gguf", ".safetensors", ".bin",
)  # fmt: skip

_FUNCTION = re.compile(r"(?P<place>[^:]+):(?P<name>[A-Za-z_]\w*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# Files that a prompt folder must contain for ratings.
_RATING_FILES = ("rubric.txt", "rating.jinja", "rating_ending.txt")


def recipes_dir() -> Path:
    """The folder of the packaged recipes with their prompts and data.

    In an installed wheel it is inside the package, in an editable install next to it.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """The packaged recipes by name, in alphabetical order."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> tuple[Path, str]:
    """The file that the argument RECIPE refers to, and its name in messages.

    A file with that path takes precedence over a packaged recipe with that name.

    Raises:
        UserError: Neither exists, or it is a folder.
    """
    path = Path(recipe).expanduser()
    if path.exists() and not path.is_dir():
        return path.resolve(), str(recipe)
    packaged = packaged_recipes()
    if str(recipe) in packaged:
        return packaged[str(recipe)], str(packaged[str(recipe)])
    if path.is_dir():
        raise UserError("this is a folder, not a recipe.", where=str(recipe), fix="Name the .yaml file in it.")
    files = [str(path.with_name(name)) for name in _names_in(path.parent) if name.endswith((".yaml", ".yml"))]
    raise UserError(
        f"there is no recipe '{recipe}', neither as a file nor in the package.",
        fix=did_you_mean(str(recipe), packaged)
        or _nearest_file(str(recipe), files)
        or f"Packaged recipes: {', '.join(packaged)}.",
    )


def prompt_folder(prompt: str) -> Path:
    """The folder of a prompt in a parsed recipe: a packaged prompt's name or a path."""
    packaged = recipes_dir() / "prompts" / prompt
    return packaged if _is_bare(prompt) and packaged.is_dir() else Path(prompt)


@dataclass(frozen=True)
class PathFinder:
    """Looks up names first in the recipe's folder, then in the current folder, then among the packaged recipes.

    Each method returns the resolved value for the recipe, and raises UserError if nothing is found.
    ``sections.Named`` defines which method a key uses.
    """

    folders: Sequence[Path]
    registry: ComponentLookup

    @classmethod
    def beside(cls, recipe: Path, registry: ComponentLookup) -> PathFinder:
        """Create one for a recipe's file."""
        return cls((recipe.parent, Path.cwd(), recipes_dir()), registry)

    def data(self, name: str) -> str:
        """An absolute path, or a dataset's Hub id unchanged: ``org/name`` or ``org/name:split``."""
        is_id = bool(_DATASET_ID.fullmatch(name)) and not name.lower().endswith(_FILE_ENDINGS)
        return self._path(name, is_id, "Write a path or a Hub id (org/name).")

    def model(self, name: str) -> str:
        """An absolute path, or unchanged: a model's Hub id (``org/name`` or ``name``) or ``package:name``."""
        is_id = bool(_MODEL_ID.fullmatch(name)) and not name.lower().endswith(_FILE_ENDINGS)
        is_id |= name.startswith("package:")
        return self._path(name, is_id, "Write a Hub id, a model folder, a .gguf file or package:NAME.")

    def prompt(self, name: str) -> str:
        """A packaged prompt's name unchanged, or the absolute path of a prompt folder."""
        folder = recipes_dir() / "prompts"
        if _is_bare(name) and (folder / name).is_dir():
            return name
        found = self.find(name)
        if found is not None and found.is_dir():
            return str(found)
        if found is not None:
            raise UserError(f"the prompt '{name}' is a file.", fix="Write the name of its folder.")
        known = _names_in(folder)
        raise UserError(
            f"there is no prompt '{name}', neither in the package nor as a folder.",
            fix=did_you_mean(name, known) or _nearest_file(name, self._siblings(name)) or f"Known: {', '.join(known)}.",
        )

    def code(self, name: str) -> str:
        """The absolute path of a .py file."""
        found = self.find(name)
        if found is None or not found.is_file():
            raise UserError(f"there is no file '{name}'.", fix=_nearest_file(name, self._siblings(name)))
        return str(found)

    def rating_prompt(self, name: str) -> str:
        """A prompt that supports ratings (the labeler ``direct``)."""
        if "direct" not in self.registry.names("labeler"):
            raise UserError("ratings come from the labeler 'direct', and none of that name is installed.")
        found = self.prompt(name)
        missing = [part for part in _RATING_FILES if not (prompt_folder(found) / part).is_file()]
        if missing:
            raise UserError(f"the prompt '{name}' has no file {missing[0]}, which ratings need.")
        return found

    def run_folder(self, name: str) -> str:
        """The absolute path of a run folder that has labels."""
        from trl_rlaif.pipeline.artifacts import LABELS

        return self._run_with(name, LABELS, "label")

    def trained_run(self, name: str) -> str:
        """The absolute path of a run folder that has a policy."""
        from trl_rlaif.pipeline.artifacts import POLICY

        return self._run_with(name, POLICY, "rl")

    def _run_with(self, name: str, artifact: str, stage: str) -> str:
        found = self.find(name)
        if found is None or not (found / artifact).exists():
            what = f"there is no folder '{name}'" if found is None else f"the folder '{name}' has no {artifact}"
            raise UserError(f"{what}.", fix=f"Write the folder of a run whose stage {stage} has ended.")
        return str(found)

    def policy(self, name: str) -> str:
        """An entry of ``reward.policies``."""
        return name if name == "base" else self.model(name)

    def reward(self, name: str) -> str:
        """A reward of ``rl.rewards``, with the path of a .py file made absolute. Nothing is imported."""
        known = ["reward", *self.registry.rewards()]
        if name in known:
            return name
        if name == "direct":
            raise UserError("'direct' is a labeler, and none of that name is installed.")
        match = _FUNCTION.fullmatch(name)
        if match and match["place"].endswith(".py"):
            return f"{self.code(match['place'])}:{match['name']}"
        if match and _MODULE.fullmatch(match["place"]):
            return name
        raise UserError(
            f"'{name}' is not a reward.",
            fix=did_you_mean(name, known)
            or f"Write {', '.join(known)}, package.module:function or path/to/file.py:function.",
        )

    def find(self, name: str) -> Path | None:
        """The absolute path of the first match; None if there is none."""
        try:
            candidates = [folder / Path(name).expanduser() for folder in self.folders]
            found = next((path for path in candidates if path.exists()), None)
        except (OSError, ValueError, RuntimeError):  # a name that is too long, contains a NUL, or '~nobody'
            return None
        # Not resolve(): in a model cache, sibling files are found by the link's name, not its target's.
        return Path(os.path.abspath(found)) if found is not None else None

    def _path(self, name: str, is_id: bool, otherwise: str) -> str:
        found = self.find(name)
        if found is not None:
            return str(found)
        if is_id:
            return name
        fix = _nearest_file(name, self._siblings(name)) or otherwise
        raise UserError(f"there is no file or folder '{name}'.", fix=fix)

    def _siblings(self, name: str) -> list[str]:
        """Existing names in the searched folders, in the same form as ``name``."""
        parent = Path(name).parent
        names: list[str] = []
        for folder in self.folders:
            names += [str(parent / sibling) for sibling in _names_in(folder / parent)]
        return names


def _nearest_file(name: str, known: Iterable[str]) -> str:
    """``did_you_mean`` for paths: a common folder or file extension does not count as similarity."""
    wanted = Path(name)
    alike = [path for path in known if difflib.get_close_matches(wanted.stem, [Path(path).stem])]
    near = difflib.get_close_matches(str(wanted), alike, n=1, cutoff=0)
    return f"Did you mean '{near[0]}'?" if near else ""


def _is_bare(name: str) -> bool:
    return Path(name).name == name and name not in (".", "..")


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (OSError, ValueError):
        return []
