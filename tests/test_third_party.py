"""Third-party plugins: in a recipe as if they were installed, and installed in a fresh environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import load_from_disk
from helpers.recipes import write_recipe

from trl_rlaif import UserError, __version__
from trl_rlaif.files import read_lines, read_state, write_state
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import ENTRY_POINT_GROUP, build_plugins
from trl_rlaif.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(__file__).parent / "test_package"
PAIRS = [
    {"id": "more", "prompt": "a", "response_1": "fox fox Fox", "response_2": "a fox", "category": "x", "human": 2},
    {"id": "fewer", "prompt": "b", "response_1": "dog", "response_2": "the FOX", "category": "x", "human": 2},
    {"id": "even", "prompt": "c", "response_1": "a fox", "response_2": "fox!", "category": "y", "human": 1},
    {"id": "none", "prompt": "d", "response_1": "a dog", "response_2": "a cat", "category": "y", "human": 1},
]


@pytest.fixture
def plugins(monkeypatch):
    """Only the test package, loaded from the entry point that its pyproject.toml declares."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"][ENTRY_POINT_GROUP].items()
    point = EntryPoint(name, value, ENTRY_POINT_GROUP)
    vars(point).update(dist=SimpleNamespace(name=project["name"], version=project["version"]))
    monkeypatch.syspath_prepend(PACKAGE)
    yield build_plugins([point])
    sys.modules.pop("rlaif_keyword", None)


@pytest.fixture
def recipe_file(tmp_path, tiny_model):
    """Makes a recipe that only labels given pairs."""

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
    assert numbers["position_bias"] is None and numbers["mass"] is None  # it does not ask a judge
    assert numbers["agreement"]["n"] == 3 and numbers["agreement"]["rate"] == pytest.approx(1.5 / 3)

    preferences = {row["id"]: row for row in load_from_disk(str(folder / "preferences"))}
    assert set(preferences) == {"more", "fewer", "even"}
    assert preferences["fewer"]["chosen"] == [{"role": "assistant", "content": "the FOX"}]
    assert preferences["fewer"]["p"] == pytest.approx(1 - expected["fewer"])


def test_it_goes_on_where_it_was(plugins, recipe_file, tmp_path):
    recipe = parse_recipe(recipe_file({"keyword": {"word": "fox"}}), registry=plugins.registry)
    folder = run_recipe(recipe, plugins, tmp_path / "out")
    whole = read_lines(folder / "labels.jsonl")
    # As after a kill in the middle of the stage.
    marker = folder / ".state" / "label.json"
    write_state(marker, read_state(marker, "") | {"complete": False})
    lines = (folder / "labels.jsonl").read_text().splitlines(keepends=True)
    (folder / "labels.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    run_recipe(recipe, plugins, tmp_path / "out", resume=True)
    assert read_lines(folder / "labels.jsonl") == whole


@pytest.mark.parametrize(
    ("labeler", "found"),
    [
        ({"keyword": {"wrod": "fox"}}, ["wrod", "word"]),
        ({"keyword": {"word": "fox", "weight": -1}}, ["weight"]),
        ("keyword", ["word"]),  # its option has no default
        ({"keywrod": {"word": "fox"}}, ["keywrod", "keyword"]),
        ("distilled", ["distilled", "keyword"]),  # built-in plugins get no special treatment
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


# ---- Installed ------------------------------------------------------------------------------------------


class Environment:
    """A fresh virtual environment with the project's wheel in it."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        self._call(sys.executable, "-m", "venv", folder / "venv")
        self._call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
        self.run("python", "-m", "pip", "install", "--no-deps", "--no-index", next(folder.glob("*.whl")))
        self._share()

    def _share(self) -> None:
        """Give it the packages that the project depends on.

        They are gigabytes, which no test should download or copy. Folders from a .pth file come after the environment's
        own packages, and .pth files in them are not read, so the checkout, an editable install there, stays invisible.
        """
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        [site] = self.bin.parent.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text("\n".join(shared) + "\n")
        command = self.bin / "pytest"  # pip would create it, but pytest is one of the shared packages
        lines = (
            f"#!{self.bin / 'python'}",
            "import sys",
            "from pytest import console_main",
            "sys.exit(console_main())",
        )
        command.write_text("\n".join(lines) + "\n")
        command.chmod(0o755)

    def run(self, *command: object, code: int = 0) -> str:
        """Run one of its commands in its working folder; returns stdout and stderr."""
        return self._call(self.bin / str(command[0]), *command[1:], cwd=self.work, code=code)

    def shell(self, script: str) -> str:
        """The same for lines of shell code."""
        return self._call("bash", "-ec", script, cwd=self.work)

    def _call(self, *command: object, cwd: Path | None = None, code: int = 0) -> str:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "200",
            # Packages that a user's pip would download are shared already.
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # which, in pip's logic, turns isolation off
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def with_plugins(environment):
    """The environment, with two new plugins installed from wheels that pip built."""
    environment.run("trl-rlaif", "new-plugin", "word-count")
    environment.run("trl-rlaif", "new-plugin", "calm", "--kind", "reward-transform")
    environment.run("python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "./word-count", "./calm")
    return environment


@pytest.mark.slow
def test_two_new_plugins_are_installed_beside_the_project_and_run(with_plugins, tiny_model):
    environment, work = with_plugins, with_plugins.work
    listing = environment.run("trl-rlaif", "plugins")
    assert re.search(r"^labeler +word_count +word-count 0\.1\.0$", listing, re.MULTILINE)
    assert re.search(r"^reward_transform +calm +calm 0\.1\.0$", listing, re.MULTILINE)

    (work / "test_origin.py").write_text(
        "import sys, pathlib, calm, trl_rlaif, trl_rlaif.testing, trl_rlaif_distilled, word_count\n"
        "def test_all_is_the_environments_own():\n"
        "    for module in (calm, trl_rlaif, trl_rlaif.testing, trl_rlaif_distilled, word_count):\n"
        "        assert pathlib.Path(module.__file__).is_relative_to(sys.prefix)\n"
    )
    assert "7 passed" in environment.run("pytest", "-q", "test_origin.py", "word-count", "calm")

    rows = [{"prompt": f"what is {i}?", "response_1": "a fox", "response_2": "dog " * (i + 1)} for i in range(8)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        work,
        tiny_model,
        data={"pairs": "pairs.jsonl"},
        label={"labeler": {"word_count": {"words": ["fox"], "weight": 2.0}}},
        reward={"num_train_epochs": 1},
        rl={"transforms": [{"calm": {"limit": 0.5}}], "total_episodes": 8},
        **dict.fromkeys(("sample", "evaluate")),
    )
    assert "report: done" in environment.run("trl-rlaif", "run", recipe.name, "--output", "out")
    out = work / "out"
    assert [row["p"] for row in read_lines(out / "labels.jsonl")] == pytest.approx([0.880797] * 8, abs=1e-6)
    logged = [row for row in read_lines(out / "metrics.jsonl") if "calm/mean" in row]
    assert len(logged) == 2 and all(abs(row["objective/scores"]) <= 0.5 for row in logged)
    assert (out / "policy" / "adapter_model.safetensors").exists() and (out / "report.html").exists()


@pytest.mark.slow
def test_an_installed_plugin_for_another_release_is_refused_before_a_run_begins(with_plugins):
    environment = with_plugins
    [metadata] = environment.bin.parent.glob("lib/python*/site-packages/calm-0.1.0.dist-info/METADATA")
    text, needed = metadata.read_text(), f"trl-rlaif>={'.'.join(__version__.split('.')[:2])}"
    assert f"\nRequires-Dist: {needed}\n" in text
    metadata.write_text(text.replace(needed, "trl-rlaif>=99"))
    try:
        said = environment.run("trl-rlaif", "run", "quickstart", "--output", "never", code=2)
    finally:
        metadata.write_text(text)
    assert f"The plugin calm 0.1.0 (calm) needs trl-rlaif >=99, and this is {__version__}." in said
    assert "Traceback" not in said
    assert not (environment.work / "never").exists()


@pytest.mark.slow
def test_the_tutorials_way_to_a_plugin(environment, tiny_model):
    """Its commands, file, recipe and check, exactly as written there."""
    section = (ROOT / "docs" / "tutorials" / "plugin.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}(\S.*)$", section.partition("## 2.")[0], re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["trl-rlaif", "cd", "pip", "pytest", "trl-rlaif"]
    said = environment.shell("\n".join(commands))
    assert "3 passed" in said and re.search(r"^labeler +my_words +my-words 0\.1\.0$", said, re.MULTILINE)

    [shown] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [file] = re.findall(r"Edit `(.*?)`", section)
    plugin = environment.work / "my-words" / file
    assert shown in plugin.read_text()
    edited = shown.replace("if pair.id not in done:", 'if pair.id not in done and "?" in pair.prompt:')
    assert edited != shown
    plugin.write_text(plugin.read_text().replace(shown, edited))
    said = environment._call(environment.bin / "pytest", cwd=environment.work / "my-words", code=1)
    assert "label() gives no label of" in said  # as step 3 promises
    plugin.write_text(plugin.read_text().replace(edited, shown.replace("1.0, gt=0", "3.0, gt=0")))

    [label], [check] = re.findall(r"`(label: .*?)`", section), re.findall(r"`(trl-rlaif check (?:.*?))`", section)
    pairs = [{"prompt": "Which?", "response_1": "A fox.", "response_2": "A dog."}]
    (environment.work / "my-pairs.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    recipe = environment.work / check.split()[-1]
    recipe.write_text(f"model: {{path: {tiny_model}}}\ndata: {{pairs: my-pairs.jsonl}}\n{label}\n")
    said = environment.shell(f"{check}\n{check.replace('check', 'run')} --output mine")
    assert "good. Stages: sample, label" in said and "label: done" in said
    [row] = read_lines(environment.work / "mine" / "labels.jsonl")
    assert row["p"] == pytest.approx(0.952574, abs=1e-6)  # logistic(3)
