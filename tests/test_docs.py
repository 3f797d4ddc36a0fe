"""What README.md must say, and which public names must explain themselves."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pluggy
import pytest

import trl_rlaif
from trl_rlaif import hookspecs
from trl_rlaif.data import Pair
from trl_rlaif.plugins import ENTRY_POINT_GROUP, build_plugins

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _hooks():
    """Every hook with its signature as the documentation writes it: ``name(argument, argument)``."""
    manager = pluggy.PluginManager("trl_rlaif")
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    hooks = [f for name, f in functions if manager.parse_hookspec_opts(hookspecs, name) is not None]
    return [f"{hook.__name__}({', '.join(inspect.signature(hook).parameters)})" for hook in hooks]


def _recipes():
    return sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_there_is_something_to_look_for():
    assert {"register_labelers(register)", "rollout_collected(trainer, rollout)"} <= set(_hooks())
    assert "quickstart" in _recipes()


@pytest.mark.parametrize("signature", _hooks())
def test_the_readme_documents_every_hook(signature):
    assert f"`{signature}`" in README


@pytest.mark.parametrize("recipe", _recipes())
def test_the_readme_lists_every_recipe(recipe):
    assert f"recipes/{recipe}.yaml" in README


def test_what_the_readme_calls_a_hook_or_a_recipe_exists():
    names = {hook.partition("(")[0] for hook in _hooks()}
    calls = re.findall(r"\b(\w+)\(([\w, ]*)\)", README)
    written = {f"{name}({args})" for name, args in calls if name in names or name.startswith("register_")}
    assert written == set(_hooks())
    assert set(re.findall(r"recipes/([\w-]+)\.yaml", README)) == set(_recipes())


def test_the_readmes_plugin_works(monkeypatch):
    source = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@hookimpl" in code)
    plugin = ModuleType("readme_plugin")
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    exec(compile(source, "README.md", "exec"), vars(plugin))
    point = EntryPoint("readme", plugin.__name__, ENTRY_POINT_GROUP)
    vars(point).update(dist=SimpleNamespace(name="readme", version="0"))
    registry = build_plugins([point]).registry
    [name] = registry.names("labeler")
    pairs = [Pair("a", "x", "please, please", "no"), Pair("b", "x", "no", "Please"), Pair("c", "x", "", "")]
    labels = {label.id: label.p for label in registry.create("labeler", name).label(pairs, None, done={"c"})}
    assert labels.keys() == {"a", "b"} and labels["a"] > 0.5 > labels["b"]


@pytest.mark.parametrize("name", [name for name in trl_rlaif.__all__ if not name.startswith("__")])
def test_every_public_name_has_a_docstring_of_its_own(name):
    value = getattr(trl_rlaif, name)
    documentation = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert documentation and documentation.strip()
    assert not documentation.startswith(f"{name}(")  # a dataclass without one gets its signature
