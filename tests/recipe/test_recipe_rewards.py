"""Weighted rewards of a recipe."""

from __future__ import annotations

import pytest


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "mine.py").write_text("")


@pytest.mark.parametrize(
    ("written", "names", "weights"),
    [
        ("[direct, my.rewards:f]", ["direct", "my.rewards:f"], None),
        ("[{reward: 1.0}, {direct: 0.5}]", ["reward", "direct"], [1.0, 0.5]),
        # Weights are in the trainer's order: the reward model first.
        ("[{direct: 0.5}, my.rewards:f, {reward: 2}]", ["direct", "my.rewards:f", "reward"], [2.0, 0.5, 1.0]),
        ("[{direct: -1e-1}]", ["direct"], [-0.1]),
    ],
)
def test_entries_are_names_or_names_with_weights(parse, prompts, written, names, weights):
    recipe = parse(f"{_head()}  rewards: {written}\n")
    assert recipe.rl.reward_names == names and recipe.rl.reward_weights == weights


def test_a_function_with_a_weight_is_found_beside_the_recipe_and_written_out_again(parse, prompts, tmp_path):
    recipe = parse(f"{_head()}  rewards: [{{mine.py:f: 0.5}}, direct]\n")
    assert recipe.rl.rewards == [{f"{tmp_path / 'mine.py'}:f": 0.5}, "direct"]
    assert recipe.to_dict()["rl"]["rewards"] == recipe.rl.rewards


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rewards: [{direct: much}]", "rewards.0"),
        ("rewards: [{direct: .inf}]", "rewards.0"),
        ("rewards: [{reward: 1.0, direct: 0.5}]", "each reward as an entry of its own"),
        ("rewards: [{}]", "each reward as an entry of its own"),
        ("rewards: [{dircet: 0.5}]", "'dircet' is not a reward"),
        ("rewards: [direct]\n  reward_weights: [1.0]", "'reward_weights' cannot be set"),
        ("rewards: [direct]\n  reward_normalization: often", "reward_normalization"),
    ],
)
def test_what_does_not_fit_is_reported(only, prompts, text, what):
    assert what in str(only(f"{_head()}  {text}\n"))


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ("[{reward: 1.0}, {reward: 2.0}]", '"reward" is listed 2 times. Write it once: {reward: 3}.'),
        ("[reward, direct, reward]", '"reward" is listed 2 times. Write it once: {reward: 2}.'),
        ("[direct, {direct: 0.5}, direct]", '"direct" is listed 3 times. Write it once: {direct: 2.5}.'),
        ("[my.rewards:f, my.rewards:g, my.rewards:f]", '"my.rewards:f" is listed 2 times'),
        ("[mine.py:f, {./mine.py:f: 1}]", "mine.py:f"),  # the same file
        ("[{reward: 0}]", "Every reward has the weight 0, which only logs it. Give at least one of them another"),
        ("[{direct: 0.0}, {reward: -0.0}]", "another weight: [{direct: 1.0}]."),
    ],
)
def test_weights_that_cannot_be_meant_are_refused_before_anything_is_paid_for(only, prompts, written, what):
    problem = only(f"{_head()}  kl_coef: 0.1\n  rewards: {written}\n")
    assert what in str(problem) and problem.where == "recipe.yaml:8"


def test_a_reward_of_weight_0_may_be_logged_beside_others(parse, prompts):
    recipe = parse(f"{_head()}  rewards: [{{direct: 0}}, reward, my.rewards:f, my.rewards:g]\n")
    assert recipe.rl.reward_weights == [1.0, 0.0, 1.0, 1.0]


def test_a_weighted_reward_model_needs_its_stage(only, prompts):
    problem = only("model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nrl:\n  rewards: [{reward: 1.0}]\n")
    assert "has no 'reward'" in problem.what


def _head():
    return "model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nlabel:\nreward:\nsample:\nrl:\n"
