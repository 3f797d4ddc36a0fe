"""New plugins install, pass their own tests, are found and pass ruff; invalid names are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import trl_rlaif
from trl_rlaif import UserError, cli
from trl_rlaif.scaffold import KINDS, create_plugin

ROOT = Path(__file__).resolve().parents[1]
# Short names, and one of maximum length: its lines must still fit.
NAMES = {
    "labeler": "words",
    "reward-transform": "a-Rather.Long_name-of-somebodys-plugin-2",
    "data-selector": "my-pick",
    "pair-sampler": "long-and-short",
}


def _wheel(project: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    return max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A new plugin of each kind, by kind."""
    folder = tmp_path_factory.mktemp("new")
    return {kind: create_plugin(name, kind, folder / kind) for kind, name in NAMES.items()}


def test_there_is_a_name_for_every_kind():
    assert set(NAMES) == set(KINDS)


def test_they_install_pass_their_tests_and_are_found(plugins, tmp_path):
    site = tmp_path / "site"
    for kind, folder in plugins.items():
        with zipfile.ZipFile(_wheel(folder, tmp_path / kind)) as wheel:
            wheel.extractall(site)
    listing = tmp_path / "test_listing.py"
    listing.write_text(
        "from trl_rlaif.plugins import installed_plugins\n"
        "def test_listing():\n"
        "    found = {(r.kind, r.name): r.distribution for r in installed_plugins().registry}\n"
        "    assert found['labeler', 'words'] == 'words'\n"
        "    assert found['data_selector', 'my_pick'] == 'my-pick'\n"
        "    assert found['pair_sampler', 'long_and_short'] == 'long-and-short'\n"
        "    long = 'a_rather_long_name_of_somebodys_plugin_2'\n"
        "    assert found['reward_transform', long] == long.replace('_', '-')\n"
    )
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "plugins")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(listing), *map(str, plugins.values())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 passed" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_well_formed(plugins, kind):
    for arguments in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."], cwd=plugins[kind], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    written = (path for path in plugins[kind].rglob("*") if path.is_file() and path.suffix != ".pyc")
    texts = {path: path.read_text(encoding="utf-8") for path in written}
    assert len(texts) == 5
    for path, text in texts.items():
        assert "{{" not in text and "{%" not in text and text.endswith("\n") and "PACKAGE" not in str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_they_need_this_minor_release(plugins, kind):
    project = tomllib.loads((plugins[kind] / "pyproject.toml").read_text())["project"]
    minor = ".".join(trl_rlaif.__version__.split(".")[:2])
    assert project["dependencies"] == [f"trl-rlaif>={minor}"]
    assert kind.replace("-", " ") in project["description"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_as_in_its_readme_names_it(plugins, kind):
    import yaml

    readme = (plugins[kind] / "README.md").read_text()
    (section,) = yaml.safe_load(readme.split("```yaml\n")[1].split("```")[0]).values()
    (value,) = section.values()
    (component,) = value if isinstance(value, dict) else value[0]
    package = next(path.parent.name for path in plugins[kind].glob("*/__init__.py"))
    assert component == package


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "distribution"),
        ("my plugin", "distribution"),
        ("../escape", "distribution"),
        ("-words", "distribution"),
        ("words-", "distribution"),
        ("wörter", "distribution"),
        ("words\n", "distribution"),
        ("w" * 41, "distribution"),
        ("3words", "begins with a digit"),
        ("class", "keyword"),
        ("Match", "keyword"),
        ("json", "standard library"),
        ("tests", "its tests"),
        ("trl-rlaif", "installed package"),
        ("trl_rlaif.direct", "installed package"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        create_plugin(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", ["folder", "file", "broken link"])
def test_nothing_is_overwritten(tmp_path, existing):
    target = tmp_path / "words"
    {"folder": target.mkdir, "file": target.touch, "broken link": lambda: target.symlink_to("nowhere")}[existing]()
    with pytest.raises(UserError, match="already exists"):
        create_plugin("words", folder=target)
    assert [path.name for path in tmp_path.rglob("*")] == ["words"]


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="'data-selector'"):
        create_plugin("words", "selector", tmp_path / "words")


def _command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-rlaif", "new-plugin", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert _command(monkeypatch, "My.Words") == 0
    assert (tmp_path / "my-words" / "my_words" / "labeler.py").exists()
    assert "cd my-words" in capsys.readouterr().out
    assert _command(monkeypatch, "words", "--kind", "data-selector", "--output", "deep/er") == 0
    assert (tmp_path / "deep" / "er" / "words" / "selector.py").exists()
    assert _command(monkeypatch, "my-words") == 2
    assert _command(monkeypatch, "words", "--kind", "labelr", "--output", "new") == 2
    assert "Did you mean 'labeler'?" in capsys.readouterr().err


def test_the_wheel_holds_templates_and_test_kit(tmp_path):
    with zipfile.ZipFile(_wheel(ROOT, tmp_path)) as wheel:
        names = set(wheel.namelist())
    for folder in ("scaffold", "testing"):
        files = (ROOT / "trl_rlaif" / folder).rglob("*")
        own = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".jinja")}
        assert own and own <= names
    assert any(name.endswith("PACKAGE/labeler.py.jinja") for name in names)
