"""``vllm_sync: adapter``: an engine that holds the base and is given the policy's adapter."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers import fake_vllm
from helpers.ppo import numbers, small_trainer
from helpers.tiny import make_llama, make_tokenizer
from peft import LoraConfig

from trl_rlaif import PPOConfig, UserError
from trl_rlaif.compat import vllm_engine
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.rl import vllm

PROMPTS = [f"what is the {'quick ' * i}fox?" for i in range(8)]


@pytest.fixture
def engines(monkeypatch):
    """The engines started, in order."""
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_engine, "_on_cpu", lambda: True)
    return fake_vllm.install(monkeypatch).started


@pytest.fixture
def folder(tmp_path):
    # bitsandbytes quantizes in blocks of 64: a narrower layer cannot be computed on a CPU.
    make_llama(len(make_tokenizer()), hidden_size=64).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer_on(folder, quantization="none", lora=None, **options):
    # Randomly initialized, so that the adapter changes the samples.
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | (lora or {}))
    kwargs = {
        "model": load_model(ModelSpec(str(folder), "float32", quantization)),
        "dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "temperature": 1.0,
        "trainer_kwargs": {"peft_config": config},
    }
    return small_trainer(folder.parent, generation="vllm", vllm_sync="adapter", **kwargs | options)


def batch_of(trainer):
    return next(iter(trainer.dataloader))


@torch.no_grad()
def test_the_engine_draws_from_the_policy_also_after_an_update(engines, folder):
    trainer = trainer_on(folder, temperature=0.0)
    responses = []
    for _ in range(2):
        batch = batch_of(trainer)
        rollout = trainer.sample(batch)
        responses.append(rollout.response_ids)
        for ids, mask, response, length in zip(
            batch["input_ids"], batch["attention_mask"], rollout.response_ids, rollout.lengths, strict=True
        ):
            prompt, drawn = ids[mask.bool()], response[:length]
            with trainer.shared.role("policy"):
                logits = trainer.shared.model(torch.cat([prompt, drawn])[None]).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).equal(drawn)
        for name, parameter in trainer.shared.named_parameters():
            if "lora_A.policy." in name:
                parameter.data.neg_()  # as loading a checkpoint does, unseen by autograd
    assert not torch.equal(*responses), "the update must change what is drawn, or the test shows nothing"


def test_an_adapter_is_read_once_and_an_engine_that_sleeps_keeps_the_base(engines, folder):
    trainer = trainer_on(folder, vllm_enable_sleep_mode=True)
    for _ in range(2):
        trainer.sample(batch_of(trainer))
    [engine] = engines
    assert engine.events == ["generate", "read", "sleep 1", "wake", "generate", "sleep 1"]
    trainer.train()
    assert engine.events.count("read") == 3 and len(engines) == 1  # the last update's adapter is only read when needed


def test_the_engine_is_the_policys_base_and_is_asked_for_the_whole_distribution(engines, folder):
    options = {"vllm_gpu_memory_utilization": 0.4, "vllm_max_model_length": 48}
    trainer = trainer_on(folder, lora={"r": 12}, temperature=0.7, **options)
    trainer.sample(batch_of(trainer))
    expected = {
        "model": str(folder), "dtype": "float32", "enforce_eager": True, "max_lora_rank": 16, "max_num_seqs": 4,
        "max_model_len": 48, "gpu_memory_utilization": 0.4,
    }  # fmt: skip
    assert expected.items() <= engines[0].options.items()
    _, params = engines[0].calls[0][0]
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.7 + 1e-7, 8, True)


def test_a_run_draws_what_it_drew_and_its_old_logprobs_are_the_trained_models(engines, folder):
    drawn = []
    for name in ("first", "second"):
        trainer = trainer_on(folder)
        trainer.train()
        entries = numbers(trainer)
        assert all(entry["val/ratio"] == pytest.approx(1, abs=1e-5) for entry in entries), name
        drawn.append([prompt for call in engines[-1].calls for prompt, _ in call])
        drawn.append([params.seed for call in engines[-1].calls for _, params in call])
    assert drawn[:2] == drawn[2:] and len(set(drawn[1])) > len(drawn[1]) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"use_dora": True}}, "plain LoRA"),
        ({"lora": {"target_modules": ["embed_tokens", "q_proj"]}}, "linear layers alone"),
        ({"lora": {"rank_pattern": {"q_proj": 8}}}, "rank_pattern"),
        ({"quantization": "nf4"}, "4 bits"),
    ],
)
def test_what_is_refused(options, message, engines, folder):
    trainer = trainer_on(folder, **options)
    with pytest.raises(UserError, match=message):
        trainer.sample(batch_of(trainer))


def test_a_server_is_refused(tmp_path):
    with pytest.raises(UserError, match="A server is given merged weights"):
        PPOConfig(str(tmp_path), generation="vllm", vllm_mode="server", vllm_sync="adapter")
