"""Checkpoints: which ones are kept, damaged ones, and resuming after a failed reward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.ppo import numbers, small_trainer
from helpers.rewards import length_penalty
from trl_rlaif_regulator.regulator import DistributionRegulator
from trl_rlaif_rehearsal.rejection import RejectionSampling

from trl_rlaif import DataSelector, Selection, UserError
from trl_rlaif.rl.ppo import checkpoint
from trl_rlaif.rl.rejection import RejectionTrainer

pytestmark = pytest.mark.trl


def test_a_checkpoint_with_a_shortened_or_missing_file_is_passed_over(tmp_path, capfd):
    small_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    assert checkpoint.find(tmp_path, True).name == "checkpoint-3"
    file = tmp_path / "checkpoint-3" / "training.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.find(tmp_path, True).name == "checkpoint-2"
    assert f"{file} is not what was written" in capfd.readouterr().err
    with pytest.raises(UserError, match="not what was written"):
        checkpoint.find(tmp_path, tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").unlink()
    assert checkpoint.find(tmp_path, True).name == "checkpoint-1"
    assert f"{file.parents[1] / 'checkpoint-2'} is not whole" in capfd.readouterr().err
    with pytest.raises(UserError, match="only a part"):
        checkpoint.find(tmp_path, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1" / "content.json").write_text("{}")
    assert checkpoint.find(tmp_path, True) is None
    (tmp_path / "checkpoint-1" / "content.json").unlink()
    assert checkpoint.find(tmp_path, True) is None


@pytest.mark.parametrize(("process", "part"), [(0, "a"), (1, "b"), (2, "b")])
def test_more_processes_than_wrote_a_checkpoint_begin_with_the_last_ones_part(process, part):
    accelerator = SimpleNamespace(distributed_type="MULTI_GPU", process_index=process, num_processes=3)
    assert checkpoint.part_of_process(["a", "b"], accelerator) == part
    with pytest.raises(UserError, match="written by 2 processes; these are 3. With DeepSpeed, resume with as many"):
        checkpoint.part_of_process(
            ["a", "b"], SimpleNamespace(**{**vars(accelerator), "distributed_type": "DEEPSPEED"})
        )


def _rewarding(values):
    """A reward that depends only on the update."""
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


def test_a_checkpoint_that_was_passed_over_takes_no_ones_place(tmp_path):
    """A skipped checkpoint may have a higher number than those that the resumed run writes."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "kl_coef": 0.0}
    options |= {"total_episodes": 16}
    small_trainer(tmp_path, trainer_kwargs={"reward_funcs": _rewarding([5.0, 1.0, 1.0, 1.0])}, **options).train()
    (tmp_path / "checkpoint-4" / "training.pt").write_bytes(b"damaged")
    assert checkpoint.find(tmp_path, True).name == "checkpoint-1"
    trainer = small_trainer(tmp_path, trainer_kwargs={"reward_funcs": _rewarding([1.0, 1.0, 1.0])}, **options)
    trainer._end_update = _failing_after(trainer._end_update, 1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    assert checkpoint.find(tmp_path, True).name == "checkpoint-2"


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
    assert len({entry["objective/kl_coef"] for entry in numbers(whole)}) == 6  # it changes
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


# ---- Failing rewards --------------------------------------------------------------------------------------


class _Alternating(DataSelector):
    """Selects the even and the odd prompts in turn."""

    def select(self, pool):
        return Selection(prompts=list(range(pool.selection % 2, len(pool), 2)))


def _broken_at(call):
    """A reward function that draws random numbers, and returns NaN in one call."""
    calls = []

    def reward(prompts, completions, completion_ids, **columns):
        noise = torch.rand(len(prompts)).tolist()
        calls.append(1)
        if len(calls) == call:
            return [float("nan")] * len(prompts)
        return [a + b for a, b in zip(length_penalty(prompts, completions, completion_ids), noise, strict=True)]

    return reward


def _drawing(folder, reward, transforms=(), **options):
    """A trainer that records in ``drawn`` the update and prompts of every batch that it samples."""
    kwargs = {"reward_funcs": reward, "reward_transforms": list(transforms)} | options.pop("trainer_kwargs", {})
    settings = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 24} | options
    trainer = small_trainer(folder, trainer_kwargs=kwargs, **settings)
    trainer.drawn, sample = [], trainer.sample
    trainer.sample = lambda batch: (trainer.drawn.append((trainer.state.global_step, batch["prompt"])), sample(batch))[
        1
    ]
    return trainer


SELECTED = {"trainer_kwargs": {"data_selectors": [_Alternating()]}, "selection_every": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "left", "options"),
    # Of 15 batches, 0-2, 5-7 and 10-12 are for the three selections, and the others for the six updates.
    [
        (1, 6, {}),
        (2, 5, {}),
        (4, 3, {"save_strategy": "no"}),
        (2, 15, SELECTED),
        (4, 12, SELECTED),  # the selection before the failed update is not repeated
        (7, 10, SELECTED),
        (9, 7, SELECTED),
    ],
)
def test_a_run_in_which_a_reward_failed_is_resumed_bit_for_bit(tmp_path, call, left, options):
    def trainer(folder, reward):
        return _drawing(tmp_path / folder, reward, [DistributionRegulator()], **options)

    whole = trainer("whole", _broken_at(0))
    whole.train()
    broken = trainer("broken", _broken_at(call))
    with pytest.raises(UserError, match="finite"):
        broken.train()
    assert checkpoint.find(tmp_path / "broken", True).name == f"checkpoint-{broken.state.global_step}"
    resumed = trainer("broken", _broken_at(0))
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=True)
    assert numbers(resumed) == numbers(whole)
    assert resumed.drawn == whole.drawn[-left:]


@pytest.mark.slow
def test_rejection_sampling_in_which_a_reward_failed_is_resumed_bit_for_bit(tmp_path):
    kwargs = {"data_selectors": [RejectionSampling(num_responses=2)]}

    def train(folder, reward, **resuming):
        trainer = _drawing(tmp_path / folder, reward, [DistributionRegulator()], trainer_kwargs=kwargs)
        RejectionTrainer.of(trainer, 3).train(**resuming)
        return trainer

    whole = train("whole", _broken_at(0))
    with pytest.raises(UserError, match="finite"):
        train("broken", _broken_at(7))  # five batches per iteration
    torch.manual_seed(99)
    resumed = train("broken", _broken_at(0), resume_from_checkpoint=True)
    assert numbers(resumed) == numbers(whole)
    assert resumed.drawn == whole.drawn[5:]


@pytest.mark.parametrize("name", ["training.pt", "trainer_state.json", "adapter_model.safetensors", "run.json"])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_with_a_word(tmp_path, capfd, name):
    small_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-3" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert checkpoint.find(tmp_path, True).name == "checkpoint-2"
    assert str(file) in capfd.readouterr().err
    with pytest.raises(UserError, match="not what was written"):
        checkpoint.find(tmp_path, file.parent)
