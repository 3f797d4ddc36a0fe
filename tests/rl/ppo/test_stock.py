"""Tests modeled on those of TRL's PPO trainer: ways to pass models, gradient checkpointing, ragged minibatches."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import concatenate_datasets
from helpers.ppo import numbers, prompts, small_trainer
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig, get_peft_model

pytestmark = pytest.mark.trl

SIZE = len(make_tokenizer())
LORA = LoraConfig(r=4, target_modules="all-linear")


def _two_adapters():
    """A policy with another adapter as its reference, which is untrained as well."""
    model = get_peft_model(make_llama(SIZE), LORA, adapter_name="learner")
    model.add_adapter("frozen", LORA)
    return model


# model, ref_model, peft_config, options
VARIANTS = {
    "separate models": (make_llama, make_llama, None, {}),
    "the reference is a copy": (make_llama, None, None, {}),
    "LoRA, without it as reference": (make_llama, None, LORA, {}),
    "LoRA, and a reference": (make_llama, make_llama, LORA, {}),
    "two adapters": (_two_adapters, None, None, {"model_adapter_name": "learner", "ref_adapter_name": "frozen"}),
}


def _trainer(folder, name, **options):
    make, make_reference, lora, more = VARIANTS[name]
    kwargs = {
        "ref_model": make_reference(SIZE) if make_reference else None,
        "reward_model": make_scorer(SIZE, seed=1),
        "value_model": make_scorer(SIZE, seed=2),
        "reward_funcs": (),
        "peft_config": copy.deepcopy(lora),
    }
    model = make() if make is _two_adapters else make(SIZE)
    return small_trainer(folder, model=model, trainer_kwargs=kwargs, **more, **options)


def _copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_and_value_learn_and_nothing_else(tmp_path, name):
    trainer = _trainer(tmp_path, name)
    still = [model for model in (trainer.ref_model, trainer.reward_model) if model is not None]
    learning = trainer.accelerator.unwrap_model(trainer.model)
    before = [_copied(model) for model in (learning.policy, learning.value_model, *still)]
    trainer.train()
    models = (learning.policy, learning.value_model, *still)
    policy, value, *others = (_changed(model, then) for model, then in zip(models, before, strict=True))
    assert value and not any(others)
    if VARIANTS[name][2] is None and name != "two adapters":
        assert len(policy) > 5
    else:
        assert policy and all("lora_" in parameter for parameter in policy)
        assert not any(".frozen." in parameter for parameter in policy)
    logged = numbers(trainer)
    assert logged[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is the initial policy
    assert abs(logged[-1]["objective/kl"]) > 1e-3


def test_every_reference_that_is_the_start_gives_the_same_run(tmp_path):
    """A separate model, a copy, or the policy's base give the same numbers for the same policy."""
    names = list(VARIANTS)
    runs = {}
    for name in names:
        trainer = _trainer(tmp_path / name, name)
        trainer.train()
        runs[name] = numbers(trainer)
    for one, other in (names[:2], names[2:4]):
        for a, b in zip(runs[one], runs[other], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["separate models", "LoRA, without it as reference"])
def test_gradient_checkpointing_changes_no_number(tmp_path, name):
    runs = []
    for checkpointing in (False, True):
        trainer = _trainer(tmp_path / str(checkpointing), name, gradient_checkpointing=checkpointing)
        trainer.train()
        learning = trainer.accelerator.unwrap_model(trainer.model)
        for model in (learning.policy, learning.value_model):
            assert model.is_gradient_checkpointing == checkpointing
        runs.append(numbers(trainer))
    for a, b in zip(*runs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_statistics_of_a_ragged_minibatch_count_every_response_alike(tmp_path):
    """Two minibatches of six, each whole or split into four and two, with equal response lengths and no learning."""
    dataset = concatenate_datasets([prompts(), prompts().select([0, 1])])
    runs = []
    for size in (6, 4):
        model = make_llama(SIZE)
        model.lm_head.weight.data *= 30
        model.lm_head.weight.data[make_tokenizer().pad_token_id] = 0  # which would end a response
        trainer = small_trainer(
            tmp_path / str(size),
            model=model,
            dataset=dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=12 // size,
            num_mini_batches=2,
            total_episodes=12,
            num_ppo_epochs=2,
            stop_token=None,
            learning_rate=0.0,
        )
        advantages = torch.linspace(-3, 3, 12)[:, None].expand(12, 8)  # so that the split into four and two matters
        trainer.compute_advantages = lambda rollout, rewards, given=advantages: (given, given + rollout.values)
        trainer.train()
        runs.append(numbers(trainer)[0])
    assert runs[0]["rollout/length"] == 8
    whole, ragged = ({k: v for k, v in run.items() if k != "val/ratio_var"} for run in runs)
    assert ragged == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert abs(whole["loss/policy_avg"]) < 1e-3  # the mean of all advantages, which is 0
