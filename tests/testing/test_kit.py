"""The test kit as a whole: light to import, every public name documented, every built-in component passes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trl_rlaif import testing
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import recipes_dir

CHECKS = {
    "labeler": testing.check_labeler,
    "reward_transform": testing.check_reward_transform,
    "data_selector": testing.check_data_selector,
    "pair_sampler": testing.check_pair_sampler,
}
# Options of components that do not work with the defaults.
OPTIONS = {
    "rubric": {"column": None, "shared": ["is polite"]},
    "revise": {"principles": str(recipes_dir() / "data" / "principles.jsonl")},
}


def _built_in():
    return [found for found in installed_plugins().registry if found.distribution == "trl-rlaif"]


def test_there_are_components_of_every_kind():
    assert {found.kind for found in _built_in()} == set(CHECKS)


@pytest.mark.parametrize("found", _built_in(), ids=lambda found: found.name)
def test_every_built_in_component_passes(found):
    CHECKS[found.kind](found.component(**OPTIONS.get(found.name, {})))


def test_importing_the_library_loads_no_test_kit_and_the_kit_nothing_heavy():
    code = (
        "import sys, trl_rlaif, trl_rlaif.cli\n"
        "print([m for m in sys.modules if m.startswith('trl_rlaif.testing')])\n"
        "import trl_rlaif.testing\n"
        "print([m for m in ('torch', 'transformers', 'pytest', 'datasets') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["[]", "[]"]


@pytest.mark.parametrize("name", testing.__all__)
def test_every_public_name_is_there_and_explained(name):
    value = getattr(testing, name)
    assert isinstance(value, str) or value.__doc__


def test_made_data_is_repeatable():
    assert testing.make_pairs() == testing.make_pairs() != testing.make_pairs(seed=1)
    assert len({pair.id for pair in testing.make_ragged_pairs()}) == len(testing.make_ragged_pairs())
    first, second = testing.make_rollout(), testing.make_rollout()
    assert torch.equal(first.logprobs, second.logprobs) and first.prompts == second.prompts
    pool = testing.make_pool(4, 3)
    assert len(pool) == 12 and pool.embeddings.shape == (12, 4)
    assert pool.prompts[0] == pool.prompts[2] != pool.prompts[3]
    scores = testing.make_preference_scores(5, expected=True, policies=2)
    assert scores.chosen.requires_grad and scores.chosen_log_ratios.shape == (5, 2)


def test_datasets_are_what_trainers_take():
    prompts, pairs = testing.make_prompt_dataset(3), testing.make_preference_dataset(3, chat=False)
    assert prompts[0]["prompt"][0]["role"] == "user" and prompts["category"] == ["a", "b", "a"]
    assert set(pairs.column_names) == {"prompt", "category", "chosen", "rejected", "p"}
    assert isinstance(pairs[0]["chosen"], str) and all(0.5 <= p <= 1 for p in pairs["p"])


def test_a_judge_without_a_rule_answers_alike_to_like_questions():
    judges = [testing.ScriptedJudge(prompt=testing.make_judge_prompt()) for _ in range(2)]
    questions = [[judges[0].prompt.compare("x", "a", "b")], [judges[0].prompt.compare("x", "b", "a")]]
    first, second = (dict(judge.ask(questions, ("1", "2", "3"))) for judge in judges)
    assert first == second and first[0] != first[1]
    (answer,) = first[0]
    assert torch.tensor(answer.logprobs[0]).exp().sum().item() == pytest.approx(0.9)
