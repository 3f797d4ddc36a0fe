"""One process that sees two GPUs: every trainer uses one of them, and says how to use both."""

from __future__ import annotations

import pytest
import torch
from helpers.ppo_task import make_trainer
from helpers.recipes import tiny_recipe
from helpers.reward import small_config
from helpers.tiny import make_scorer, make_tokenizer
from transformers import TrainingArguments

from trl_rlaif import RewardTrainer, hardware
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work import dpo, grpo_rloo, sft
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.rl.rejection import sft_config

pytestmark = pytest.mark.trl


@pytest.fixture
def two_gpus(monkeypatch):
    """Makes transformers see two GPUs, until it is told to use one."""

    class Spread(torch.nn.DataParallel):
        def __init__(self, *_, **__):
            raise AssertionError("spread over GPUs")

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 1 if self._n_gpu == 1 else 2))
    monkeypatch.setattr(torch.nn, "DataParallel", Spread)
    hardware._say_once.cache_clear()


def test_transformers_takes_every_gpu_that_a_process_sees(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, bf16=False, report_to=[])
    assert (args.n_gpu, args.train_batch_size) == (2, 6)
    assert (hardware.use_one_gpu(args).n_gpu, args.train_batch_size) == (1, 3)


def test_the_reward_model_is_not_spread(two_gpus, tmp_path, capsys):
    rows = [{"chosen_ids": [3, 4, 5 + i], "rejected_ids": [3, 4, 9, 2], "p": 0.9, "prompt_length": 2} for i in range(6)]
    args = small_config(tmp_path, per_device_train_batch_size=3, max_steps=2)
    trainer = RewardTrainer(
        model=make_scorer(), args=args, train_dataset=_dataset(rows), processing_class=make_tokenizer()
    )
    trainer.train()
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "sees 2 GPUs and trains on one" in said and "accelerate launch --num_processes 2" in said


def _dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_ppo_and_rejection_sampling_say_it_once(two_gpus, tmp_path, capsys):
    trainer = make_trainer(tmp_path, prompts=8, per_device_train_batch_size=4, total_episodes=4)
    assert trainer.args.n_gpu == 1 and sft_config(trainer.args, seed=1).n_gpu == 1
    assert " ".join(capsys.readouterr().err.split()).count("trains on one") == 1


@pytest.fixture
def context(tmp_path, tiny_model):
    def of(**sections):
        recipe = tiny_recipe(tmp_path, tiny_model, **sections)
        return Context(recipe, RunFolder(tmp_path / "out"), installed_plugins())

    return of


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_group_trainers(two_gpus, context, algorithm):
    rl = {"algorithm": algorithm, "rewards": ["helpers.rewards:even_share"], "num_generations": 2}
    trainer, *_ = grpo_rloo.build_trainer(context(reward=None, rl=rl))
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 4


def test_fine_tuning_and_dpo(two_gpus, context, tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"prompt": "what is 1?", "completion": "a fox"}\n')
    trainer = sft.build_trainer(context(sft={"data": "sft.jsonl", "per_device_train_batch_size": 3}))
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 3
    config, _ = dpo.trainer_config(context(reward=None, rl={"algorithm": "dpo", "per_device_train_batch_size": 3}))
    assert config.n_gpu == 1 and config.train_batch_size == 3
