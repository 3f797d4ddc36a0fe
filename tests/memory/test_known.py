"""Packaged recipes are planned offline, from the known configurations of their models."""

from __future__ import annotations

import pytest

from trl_rlaif.memory import ModelShape, load_config
from trl_rlaif.models.known import known_config
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import packaged_recipes, parse_recipe


@pytest.mark.parametrize(
    ("path", "parameters"),  # the Hub's parameter counts from safetensors
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_a_known_configuration_has_the_parameters_of_its_model(path, parameters):
    assert ModelShape.from_config(load_config(path)).numel == parameters


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    assert known_config("Qwen/Qwen2.5-0.5B-Instruct") is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen/Qwen2.5-0.5B-Instruct").mkdir(parents=True)
    assert known_config("Qwen/Qwen2.5-0.5B-Instruct") is None


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_names_a_known_model(name):

    path = parse_recipe(name, registry=installed_plugins().registry).model.path
    assert path.startswith("package:") or known_config(path) is not None
