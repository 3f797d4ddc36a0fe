"""A plugin of somebody else's labels a recipe's pairs, as if it had been installed."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_from_disk
from helpers.recipes import write_recipe

from trl_rlaif import UserError
from trl_rlaif.artifacts import read_lines
from trl_rlaif.plugins import ENTRY_POINT_GROUP, build_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.runner import run_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).parent / "test_package"
PAIRS = [
    {"id": "more", "prompt": "a", "response_1": "fox fox Fox", "response_2": "a fox", "category": "x", "human": 2},
    {"id": "fewer", "prompt": "b", "response_1": "dog", "response_2": "the FOX", "category": "x", "human": 2},
    {"id": "even", "prompt": "c", "response_1": "a fox", "response_2": "fox!", "category": "y", "human": 1},
    {"id": "none", "prompt": "d", "response_1": "a dog", "response_2": "a cat", "category": "y", "human": 1},
]


@pytest.fixture
def plugins(monkeypatch):
    """Nothing but the package, from the entry point that its pyproject.toml declares."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"][ENTRY_POINT_GROUP].items()
    point = EntryPoint(name, value, ENTRY_POINT_GROUP)
    vars(point).update(dist=SimpleNamespace(name=project["name"], version=project["version"]))
    monkeypatch.syspath_prepend(PACKAGE)
    yield build_plugins([point])
    sys.modules.pop("rlaif_keyword", None)


@pytest.fixture
def recipe_file(tmp_path, tiny_model):
    """Make a recipe that labels given pairs, and does no more."""

    def make(labeler):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        rest = dict.fromkeys(("sample", "reward", "rl", "evaluate", "report"))
        data = {"pairs": "pairs.jsonl"}
        return write_recipe(tmp_path, tiny_model, data=data, label={"labeler": labeler}, **rest)

    return make


def test_it_labels_a_recipes_pairs(plugins, recipe_file, tmp_path):
    path = recipe_file({"keyword": {"word": "fox", "weight": 0.5}})
    recipe = parse_recipe(path, registry=plugins.registry)
    assert recipe.label.labeler.options == {"word": "fox", "weight": 0.5}
    folder = run_recipe(recipe, plugins, tmp_path / "out")

    rows = {row["id"]: row for row in read_lines(folder / "labels.jsonl")}
    expected = {"more": 0.731058578630005, "fewer": 0.377540668798145, "even": 0.5}  # logistic(0.5 n)
    assert rows.pop("none")["p"] is None
    assert {id: row["p"] for id, row in rows.items()} == pytest.approx(expected, rel=1e-12)
    assert all(row["judge"] == "keyword" for row in rows.values())
    numbers = folder.results()["label"]
    assert (numbers["pairs"], numbers["labeled"]) == (4, 3)
    assert numbers["skipped"] == {"the word is in neither response": 1}
    assert numbers["position_bias"] is None and numbers["mass"] is None  # it asks in no order
    assert numbers["agreement"]["n"] == 3 and numbers["agreement"]["rate"] == pytest.approx(1.5 / 3)

    preferences = {row["id"]: row for row in load_from_disk(str(folder / "preferences"))}
    assert set(preferences) == {"more", "fewer", "even"}
    assert preferences["fewer"]["chosen"] == [{"role": "assistant", "content": "the FOX"}]
    assert preferences["fewer"]["p"] == pytest.approx(1 - expected["fewer"])


def test_it_goes_on_where_it_was(plugins, recipe_file, tmp_path):
    recipe = parse_recipe(recipe_file({"keyword": {"word": "fox"}}), registry=plugins.registry)
    folder = run_recipe(recipe, plugins, tmp_path / "out")
    whole = read_lines(folder / "labels.jsonl")
    # As a kill in the middle of the stage leaves it.
    marker = folder / ".state" / "label.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"complete": False}))
    lines = (folder / "labels.jsonl").read_text().splitlines(keepends=True)
    (folder / "labels.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    run_recipe(recipe, plugins, tmp_path / "out", resume=True)
    assert read_lines(folder / "labels.jsonl") == whole


@pytest.mark.parametrize(
    ("labeler", "found"),
    [
        ({"keyword": {"wrod": "fox"}}, ["wrod", "word"]),
        ({"keyword": {"word": "fox", "weight": -1}}, ["weight"]),
        ("keyword", ["word"]),  # which has no default
        ({"keywrod": {"word": "fox"}}, ["keywrod", "keyword"]),
        ("distilled", ["distilled", "keyword"]),  # the library knows no plugin by name
    ],
)
def test_its_options_are_checked_with_the_recipe(plugins, recipe_file, labeler, found):
    path = recipe_file(labeler)
    with pytest.raises(UserError) as caught:
        parse_recipe(path, registry=plugins.registry)
    text = str(caught.value)
    assert f"{path.name}:" in text and all(part in text for part in found)
    assert len(caught.value.problems) <= 2


def test_the_registry_names_its_distribution(plugins):
    found = plugins.registry.find("labeler", "keyword")
    assert found.distribution == "rlaif-keyword"
    with pytest.raises(UserError, match="rlaif-keyword: labeler 'keyword', option 'word'"):
        plugins.registry.create("labeler", "keyword")
