"""`trl-rlaif init`: every goal's recipe passes the check, fits its GPU, and evaluates on separate prompts."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from helpers.recipes import run_cli

from trl_rlaif.cli import app
from trl_rlaif.errors import UserError
from trl_rlaif.memory import capacity, plan_memory
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.starting import GOALS


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(40)))
    return path


def _init(path, prompts, *more):
    app(["init", str(path), "--data", str(prompts), *more], standalone_mode=False)
    return parse_recipe(path, registry=installed_plugins().registry)


@pytest.mark.parametrize("goal", GOALS)
def test_a_recipe_for_each_goal_passes_the_check(tmp_path, tiny_model, prompts, goal, capsys):
    path = tmp_path / "made" / "mine.yaml"
    recipe = _init(path, prompts, "--model", tiny_model, "--gpu", "0", "--goal", goal)
    app(["check", str(path)], standalone_mode=False)
    assert ": good." in capsys.readouterr().out
    assert (recipe.rl.algorithm if recipe.rl else "labels") == goal
    assert (recipe.evaluate is not None) == (goal != "labels")
    if recipe.evaluate:
        parts = [open(place).read().splitlines() for place in (recipe.data.prompts, recipe.data.eval_prompts)]
        assert [len(part) for part in parts] == [36, 4]
        assert sorted(sum(parts, [])) == sorted(prompts.read_text().splitlines())
    text = path.read_text()
    assert "  # " in text and text.startswith(f"# {GOALS[goal]}.")


@pytest.mark.parametrize(("size", "gpu", "quantization"), [("7B", 24, "none"), ("7B", 12, "nf4"), ("3B", 8, "nf4")])
def test_it_fits_the_card(tmp_path, prompts, size, gpu, quantization, capsys):
    name = f"Qwen/Qwen2.5-{size}-Instruct"
    recipe = _init(tmp_path / "r.yaml", prompts, "--model", name, "--gpu", str(gpu), "--goal", "ppo")
    assert recipe.model.quantization == quantization
    assert plan_memory(recipe).peak <= capacity(gpu)
    said = capsys.readouterr().out
    assert f"of {gpu} GiB" in said and "4 prompts are held out" in said


def test_what_is_too_large_leaves_nothing_behind(tmp_path, prompts):
    with pytest.raises(UserError, match="too large for 2 GB"):
        _init(tmp_path / "r.yaml", prompts, "--model", "Qwen/Qwen2.5-7B-Instruct", "--gpu", "2", "--goal", "ppo")
    assert os.listdir(tmp_path) == ["all.jsonl"]


def test_nothing_is_overwritten(tmp_path, tiny_model, prompts):
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        _init(path, prompts, "--model", tiny_model, "--gpu", "0", "--goal", "dpo")
    assert path.read_text() == "mine"
    (tmp_path / "s.eval_prompts.jsonl").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        _init(tmp_path / "s.yaml", prompts, "--model", tiny_model, "--gpu", "0", "--goal", "dpo")
    assert (tmp_path / "s.eval_prompts.jsonl").read_text() == "mine"


def test_a_prompt_that_repeats_is_held_out_everywhere_or_nowhere(tmp_path, tiny_model):
    rows = [json.dumps({"prompt": f"Question\u2028{i % 20}?"}, ensure_ascii=False) for i in range(60)]
    (tmp_path / "all.jsonl").write_text("\n".join(rows), encoding="utf-8")
    _init(tmp_path / "r.yaml", tmp_path / "all.jsonl", "--model", tiny_model, "--gpu", "0", "--goal", "dpo")
    parts = [(tmp_path / f"r.{key}.jsonl").read_text("utf-8").split("\n")[:-1] for key in ("prompts", "eval_prompts")]
    assert [len(part) for part in parts] == [54, 6] and not set(parts[0]) & set(parts[1])
    assert sorted(sum(parts, [])) == sorted(rows)


def test_what_is_not_given_is_asked(tmp_path, tiny_model, prompts, monkeypatch):
    answers = iter([tiny_model, str(prompts), 0, "fame", "grpo"])
    monkeypatch.setattr("typer.prompt", lambda *args, **kwargs: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    path = tmp_path / "r.yaml"
    app(["init", str(path)], standalone_mode=False)
    assert yaml.safe_load(path.read_text())["rl"]["rewards"] == ["direct"]


def test_without_a_terminal_the_options_are_named(tmp_path, monkeypatch, capsys):
    code, message = run_cli(monkeypatch, capsys, "init", tmp_path / "r.yaml", "--goal", "dpo")
    assert code == 2 and "--model, --data, --gpu and --goal" in message
