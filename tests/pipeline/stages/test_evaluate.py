"""The evaluate stage's numbers from its judged prompts."""

from __future__ import annotations

import pytest
from helpers.recipes import tiny_recipe

from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.labeler_rewards import _measured
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work.evaluate import _numbers
from trl_rlaif.plugins import installed_plugins


def _rows(category, preferred, gain, count=8):
    row = {"set": "test", "category": category, "ended_start": 1.0, "ended_trained": 1.0}
    row |= {"start": "a fox", "trained": "a dog", "tokens_start": 9, "tokens_trained": 9}
    row |= {"p_trained": preferred, "mean_reward_start": 0.0}
    return [row | {"prompt": f"{category} {i}", "mean_reward_trained": gain + 0.1 * (i % 3 - 1)} for i in range(count)]


@pytest.mark.parametrize(
    ("preferred", "gain", "count", "drift"),
    [(0.2, 1.0, 9, True), (0.8, 1.0, 9, False), (0.2, -1.0, 9, False), (0.2, 0.0, 9, False), (0.2, 1.0, 4, False)],
)
def test_a_category_whose_reward_rises_against_the_judge_drifts(preferred, gain, count, drift):
    numbers = _numbers([*_rows("code", preferred, gain, count), *_rows("chat", 0.9, 0.5)], seed=1)
    code, chat = numbers["by_category"]["code"], numbers["by_category"]["chat"]
    assert (code["drift"], chat["drift"]) == (drift, False)
    assert code["n"] == count and code["win_rate"] == (preferred > 0.5)
    if count == 9:
        assert code["reward_gain"]["mean"] == pytest.approx(gain, abs=1e-9)


def test_without_a_reward_model_nothing_drifts():
    rows = [row | {"mean_reward_start": None, "mean_reward_trained": None} for row in _rows("code", 0.1, 1.0)]
    assert _numbers(rows, seed=1)["by_category"]["code"] == {
        "win_rate": 0.0, "n": 8, "reward_gain": None, "drift": False
    }  # fmt: skip


def test_a_judge_that_is_of_two_minds_raises_no_alarm():
    rows = _rows("code", 0.1, 1.0, 5)
    for row in rows[:2]:
        row["p_trained"] = 0.9
    code = _numbers(rows, seed=1)["by_category"]["code"]
    assert code["win_rate"] == 0.4 and not code["drift"]


@pytest.mark.parametrize(
    ("rl", "measured"),
    [
        ({"rewards": ["reward", "direct", "rubric"]}, ["direct", "rubric"]),
        ({"rewards": ["ranking", "direct"], "algorithm": "grpo"}, ["direct"]),
        ({"algorithm": "dpo", "rewards": ["direct"]}, []),
    ],
)
def test_labelers_that_score_single_responses_are_asked_about_held_out_prompts(tiny_model, tmp_path, rl, measured):
    recipe = tiny_recipe(tmp_path, tiny_model, rl=rl)
    assert _measured(Context(recipe, RunFolder(tmp_path / "run"), installed_plugins())) == measured
