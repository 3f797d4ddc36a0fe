"""Checks the names of a new plugin, and writes its folder from templates."""

from __future__ import annotations

import difflib
import importlib.util
import keyword
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trl_rlaif import __version__
from trl_rlaif.errors import UserError
from trl_rlaif.files import write_folder

Kind = Literal["labeler", "reward-transform", "data-selector", "pair-sampler"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TEMPLATES = Path(__file__).parent / "templates"
# Placeholder for the plugin's package name in file names.
PACKAGE = "PACKAGE"

_SUFFIX = {
    "labeler": "Labeler",
    "reward-transform": "Transform",
    "data-selector": "Selector",
    "pair-sampler": "Sampler",
}
_NAME = re.compile(r"[a-z0-9]|[a-z0-9][a-z0-9._-]*[a-z0-9]", re.IGNORECASE | re.ASCII)
_LONGEST = 40


@dataclass(frozen=True)
class PluginNames:
    """The names of a plugin and its parts.

    Args:
        distribution: Name for pip, normalized (PEP 503): ``my-words``.
        package: Name in Python and in recipes: ``my_words``.
        cls: Name of the component's class: ``MyWordsLabeler``.
        kind: Kind of the component, in words: ``data selector``.
        requires: Minimum release of trl-rlaif: ``0.1``.
    """

    distribution: str
    package: str
    cls: str
    kind: str
    requires: str

    @classmethod
    def of(cls, name: str, kind: Kind) -> PluginNames:
        """The names for a distribution name given by a user.

        Raises:
            UserError: It is not a valid distribution name (PEP 508), or its import name is not an identifier, is a
                keyword or a standard library module, or is taken by an installed package.
        """
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise UserError(
                f"'{name}' cannot be the name of a distribution.",
                fix=f"Write up to {_LONGEST} letters a-z, digits and '-', with a letter at the start: my-words.",
            )
        distribution = re.sub(r"[-_.]+", "-", name).lower()
        package = distribution.replace("-", "_")
        if reason := _taken(package):
            raise UserError(f"'{package}' cannot be the plugin's import name: it {reason}.", fix="Choose another name.")
        words = "".join(word.capitalize() for word in package.split("_"))
        suffix = "" if words.endswith(_SUFFIX[kind]) else _SUFFIX[kind]
        requires = ".".join(__version__.split(".")[:2])
        return cls(distribution, package, words + suffix, kind.replace("-", " "), requires)


def _taken(package: str) -> str:
    """Why a plugin's package cannot have this name; empty if it can."""
    if not package.isidentifier():
        return "begins with a digit"
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        return "is a keyword of Python"
    if package in sys.stdlib_module_names:
        return "belongs to Python's standard library"
    if package == "tests":
        return "is the folder of its tests"
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ""
    # A folder of that name in the current one is not an installed package.
    return "is taken by an installed package" if spec is not None and spec.origin is not None else ""


def create_plugin(name: str, kind: Kind = "labeler", folder: Path | None = None) -> Path:
    """Write a plugin's folder: pyproject.toml, the package, a test and a README.

    Args:
        name: Name of the distribution.
        kind: Kind of the component.
        folder: The new folder; None: the distribution's name, in the current folder.

    Returns:
        The folder.

    Raises:
        UserError: The name cannot be used, there is no such kind, or the folder already exists.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        fix = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(KINDS)}."
        raise UserError(f"There is no kind of plugin '{kind}'.", fix=fix)
    names = PluginNames.of(name, kind)
    folder = folder or Path(names.distribution)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} already exists; nothing is overwritten.", fix="Choose another name or --output.")
    templates = [path for part in ("common", kind) for path in sorted((TEMPLATES / part).rglob("*.jinja"))]
    files = {path: _render(path, names) for path in templates}

    def write(building: Path) -> None:
        for path, text in files.items():
            inside = path.relative_to(TEMPLATES).with_suffix("").parts[1:]
            target = building.joinpath(*(part.replace(PACKAGE, names.package) for part in inside))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")

    write_folder(folder, write)
    return folder


def _render(path: Path, names: PluginNames) -> str:
    environment = Environment(
        loader=FileSystemLoader(path.parent), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.get_template(path.name).render(asdict(names))
