"""Numbers that TRL's configs accept but no training can use are refused with their line."""

from __future__ import annotations

import dataclasses
import math

import pytest

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.recipe.ranges import RANGES, out_of_range
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES, config_hints

RECIPE = """\
model: {path: gpt2}
data: {prompts: prompts.jsonl}
rl:
  rewards: [direct]
"""
SENSELESS = [
    "kl_coef: -1", "gamma: 5", "gamma: -0.1", "lam: 1.5", "temperature: 0", "temperature: .nan", "learning_rate: .inf",
    "learning_rate: -1.0e-5", "save_steps: -1", "save_steps: 0", "total_episodes: 0", "num_ppo_epochs: 0",
    "per_device_train_batch_size: 0", "gradient_accumulation_steps: -3", "response_length: 0", "max_grad_norm: -1",
    "cliprange: 0", "vf_coef: .nan", "adam_beta1: 1", "max_failed: 1.5", "missing_eos_penalty: 0",
    "rehearsal_coef: -0.1", "vllm_gpu_memory_utilization: 0", "vllm_server_port: 70000",
]  # fmt: skip


@pytest.mark.parametrize("key", SENSELESS)
def test_senseless_numbers_are_refused_by_line(only, key):
    problem = only(RECIPE + f"  {key}\n")
    assert problem.where == "recipe.yaml:5"
    assert problem.what.startswith(f"'{key.split(':')[0]}' in section 'rl' is ")
    assert problem.fix.startswith("It must be ")


@pytest.mark.parametrize("key", ["num_generations: 1", "beta: -1", "epsilon: 0", "top_p: 0", "num_iterations: 0"])
def test_so_are_those_of_trls_own_trainers(only, key):
    assert only(RECIPE + f"  algorithm: grpo\n  {key}\n").fix.startswith("It must be ")


def test_every_default_is_in_its_range():
    sections = [(section, None) for section in CONFIG_CLASSES] + [("rl", name) for name in ALGORITHMS]
    known = set()
    for section, algorithm in sections:
        known |= set(config_hints(section, algorithm))
        for module, name in {CONFIG_CLASSES[section], *([ALGORITHMS[algorithm].config] if algorithm else [])} - {None}:
            config = getattr(__import__(module, fromlist=[name]), name)
            for field in dataclasses.fields(config):
                assert out_of_range(field.name, field.default) is None, (name, field.name, field.default)
    assert sorted(set(RANGES) - known) == []


def test_the_ends_of_a_range():
    assert out_of_range("gamma", 0) is None and out_of_range("gamma", 1.0) is None
    assert out_of_range("top_p", 0) == "above 0 to 1"
    assert out_of_range("adam_beta1", 1) == "0 and below 1"
    assert out_of_range("kl_coef", -1e-9) == "0 or more"
    assert out_of_range("no_such_field", math.nan) == "a finite number"
    assert out_of_range("no_such_field", -5) is None and out_of_range("kl_coef", None) is None


def test_a_batch_that_does_not_divide(only):
    what = "a batch of 8 x 1 responses cannot be divided into num_mini_batches: 3."
    assert only(RECIPE + "  num_mini_batches: 3\n").what == what


@pytest.mark.parametrize("key", ["cliprange: .inf", "max_grad_norm: .inf", "save_total_limit: 0"])
def test_numbers_that_mean_no_limit_are_taken(parse, key):
    assert parse(RECIPE + f"  {key}\n").rl.config


def test_dpo_samples_nothing_for_selectors(problems):
    found = problems("model: {path: gpt2}\ndata: {prompts: prompts.jsonl}\nsample:\nlabel:\n"
                     "rl: {algorithm: dpo, selectors: [rehearsal], transforms: [regulator]}\n")  # fmt: skip
    assert [problem.what for problem in found] == [
        "'dpo' samples no responses for selectors.", "'dpo' samples no responses for transforms."
    ]  # fmt: skip
