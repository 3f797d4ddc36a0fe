"""Checkpoints: what is kept, and what a power cut left of one."""

from __future__ import annotations

import pytest
import torch
from helpers.ppo import numbers, small_trainer

from trl_rlaif import UserError
from trl_rlaif.ppo import checkpoint

pytestmark = pytest.mark.trl


def test_a_checkpoint_with_a_shortened_or_missing_file_is_passed_over(tmp_path):
    small_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    assert checkpoint.find(tmp_path, True).name == "checkpoint-3"
    file = tmp_path / "checkpoint-3" / "training.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.find(tmp_path, True).name == "checkpoint-2"
    with pytest.raises(UserError, match="only a part"):
        checkpoint.find(tmp_path, tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").unlink()
    assert checkpoint.find(tmp_path, True).name == "checkpoint-1"
    (tmp_path / "checkpoint-1" / "content.json").unlink()
    assert checkpoint.find(tmp_path, True) is None


def _rewarding(values):
    """A reward that depends on the update alone."""
    of_update = iter(values)

    def reward(prompts, completions, **_):
        value = next(of_update)
        return [value for _ in prompts]

    return reward


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "total_episodes": 20, "kl_coef": 0.0}
    trainer = small_trainer(tmp_path, trainer_kwargs={"reward_funcs": _rewarding([1.0, 5.0, 2.0, 4.0, 3.0])}, **options)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert trainer.state.best_metric == 5.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")


def test_another_metric_may_decide(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "total_episodes": 12, "kl_coef": 0.0}
    options |= {"metric_for_best_model": "objective/scores", "greater_is_better": False}
    rewards = {"reward_funcs": _rewarding([3.0, 1.0, 2.0])}
    trainer = small_trainer(tmp_path, trainer_kwargs=rewards, **options)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert trainer.state.best_metric == 1.0


def test_the_steered_coefficient_and_the_best_come_back(tmp_path):
    options = {"total_episodes": 24, "kl_target": 0.01, "kl_horizon": 16, "save_strategy": "steps", "save_steps": 2}
    whole = small_trainer(tmp_path / "whole", **options)
    whole.train()
    assert len({entry["objective/kl_coef"] for entry in numbers(whole)}) == 6  # it moves
    stopped = small_trainer(tmp_path / "stopped", **options)
    stopped._end_update = _failing_after(stopped._end_update, 3)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(99)
    resumed = small_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert numbers(resumed) == numbers(whole)
    assert resumed.state.best_metric == whole.state.best_metric


def _failing_after(function, count):
    calls = []

    def run(*args):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return function(*args)

    return run
