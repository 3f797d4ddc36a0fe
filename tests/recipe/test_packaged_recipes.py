"""Every packaged recipe runs to the end on a tiny model: all it names exists, and its stages fit together.

test_docs_commands.py runs those that the README or docs/ run.
"""

from __future__ import annotations

import pytest
from helpers.packaged import assert_complete, save_model, tiny_overrides
from helpers.pages import COMMANDS

from trl_rlaif.cli import app
from trl_rlaif.recipe import packaged_recipes

SHOWN = {words[1] for page in COMMANDS.values() for words, _ in page if words[0] == "run"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if name not in SHOWN])
def test_a_packaged_recipe_runs_to_its_end(name, model, tmp_path):
    changes = [word for text in tiny_overrides(packaged_recipes()[name], model, tmp_path) for word in ("--set", text)]
    app(["run", name, "--output", str(tmp_path / "out"), *changes], standalone_mode=False)
    assert_complete(tmp_path / "out")
