"""The first rollout is compared with plain forward passes: errors of transformers are avoided or refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from helpers.faulty import FAULTY, faulty
from helpers.ppo import small_trainer
from helpers.tiny import make_llama, make_tokenizer
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_rlaif import SharedBase, UserError
from trl_rlaif.models import forward
from trl_rlaif.models.kernels.fused_lora import fuse_lora
from trl_rlaif.models.role_models import SharedRoleModels
from trl_rlaif.responses import ResponseReader
from trl_rlaif.rl import verification
from trl_rlaif.rl.generation import RolloutGenerator

PROMPTS = (30, 4, 11, 30, 7)
TEMPERATURE = 0.7


def _actors(model) -> SharedRoleModels:
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    shared = SharedBase(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    shared.add_value()
    fuse_lora(shared.peft)
    return SharedRoleModels(shared.eval())


def _generator(**options) -> RolloutGenerator:
    arguments = {
        "temperature": TEMPERATURE,
        "generation": "transformers",
        "local_rollout_forward_batch_size": 4,
        "per_device_train_batch_size": 2,
        "response_length": 12,
        "bf16": False,
    }
    return RolloutGenerator(
        SimpleNamespace(**arguments | options), Accelerator(cpu=True), ResponseReader(make_tokenizer(), ())
    )


def _batch(lengths=PROMPTS):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 300, mask.shape, generator=generator).masked_fill(~mask, 0)
    return {"input_ids": ids, "attention_mask": mask.long(), "prompt": [""] * len(lengths), "columns": {}}


def _draw(sampler, role_models, batch=None, seed=5):
    torch.manual_seed(seed)
    return sampler.draw(role_models, batch or _batch())


@torch.no_grad()
def _plain(role_models, part, rollout):
    """(B, T) log-probabilities of every sequence alone, from plain calls of transformers."""
    found = torch.zeros_like(rollout.logprobs)
    with role_models.role(part):
        for i, n in enumerate(rollout.lengths.tolist()):
            prompt, response = rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.response_ids[i][:n]
            logits = role_models.model(part)(input_ids=torch.cat((prompt, response))[None]).logits[
                0, len(prompt) - 1 : -1
            ]
            found[i, :n] = (logits / TEMPERATURE).log_softmax(-1).gather(1, response[:, None])[:, 0]
    return found


@pytest.mark.parametrize("family", FAULTY)
def test_what_padding_or_a_cache_changes_is_computed_in_another_way(family, caplog):
    role_models, sampler = _actors(faulty(family)), _generator()
    with caplog.at_level(logging.WARNING):
        rollout = _draw(sampler, role_models)
    torch.testing.assert_close(rollout.logprobs, _plain(role_models, "policy", rollout), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rollout.ref_logprobs, _plain(role_models, "reference", rollout), rtol=1e-4, atol=1e-4)
    assert sampler.records == (family != "Zamba2")
    assert f"{family}ForCausalLM: log-probabilities differ" in caplog.text
    # From then on, it does so right away.
    again = _draw(sampler, role_models)
    assert torch.equal(again.response_ids, rollout.response_ids) and torch.equal(again.values, rollout.values)


def test_a_fault_of_padding_is_seen_through_bfloat16():
    role_models, sampler = _actors(faulty("RecurrentGemma")), _generator(bf16=True)
    _draw(sampler, role_models)
    assert not sampler.pads and sampler.records


@pytest.mark.parametrize("bf16", [False, True])
def test_a_sound_model_is_verified_without_a_trace(monkeypatch, caplog, bf16):
    role_models, calls = _actors(make_llama()), []
    verify = RolloutGenerator._verify
    monkeypatch.setattr(RolloutGenerator, "_verify", lambda *a, **k: calls.append(k) or verify(*a, **k))
    sampler, unverified = _generator(bf16=bf16), _generator(bf16=bf16)
    unverified._unverified = set()
    for lengths in ((6, 6), PROMPTS, PROMPTS, (6, 6)):
        batch = _batch(lengths)
        found, state = _draw(sampler, role_models, batch), torch.get_rng_state()
        expected = _draw(unverified, role_models, batch)
        assert torch.equal(torch.get_rng_state(), state)
        for name in ("response_ids", "logprobs", "ref_logprobs", "values"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert calls == [{"padded": False}, {"padded": True}]
    assert sampler.pads and sampler.records and not caplog.records


def test_a_model_that_nothing_helps_is_refused(monkeypatch):
    logprobs = forward.logprobs
    monkeypatch.setattr(forward, "logprobs", lambda *a: tuple(x + 0.1 / TEMPERATURE for x in logprobs(*a)))
    with pytest.raises(UserError, match=r"LlamaForCausalLM: .*0.1 in the policy's .* another model\.") as raised:
        _draw(_generator(), _actors(make_llama()))
    assert "vllm" not in str(raised.value)


def test_responses_of_another_distribution_are_refused(monkeypatch):
    """The forward passes are right but the samples are wrong, which recomputed log-probabilities would hide."""
    generate = RolloutGenerator._generate

    def wrong(*arguments):
        response_ids, logprobs = generate(*arguments)
        return response_ids, logprobs - 1

    monkeypatch.setattr(RolloutGenerator, "_generate", wrong)
    with pytest.raises(UserError, match="Set generation: vllm"):
        _draw(_generator(), _actors(make_llama()))


def test_rows_are_those_that_are_padded_most_and_what_pads_them():
    role_models, sampler = _actors(make_llama()), _generator()
    for lengths, rows in (((30, 4, 11, 30, 7), [1, 4, 2, 3]), ((5, 3), [1, 0]), ((5,), [0])):
        assert verification.chosen_rows(_draw(sampler, role_models, _batch(lengths))).tolist() == rows


@pytest.mark.parametrize(
    ("dtype", "bf16", "matmul", "limit"),
    [
        (torch.float32, False, "highest", 2e-4),
        (torch.float32, False, "high", 1 / 32),
        (torch.float32, True, "highest", 0.25),
        (torch.bfloat16, False, "highest", 0.25),
        (torch.float16, False, "highest", 1 / 32),
    ],
)
def test_the_tolerance_is_that_of_the_precision(dtype, bf16, matmul, limit):
    role_models, before = _actors(make_llama().to(dtype)), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        assert verification.tolerance(role_models, SimpleNamespace(bf16=bf16)) == limit
    finally:
        torch.set_float32_matmul_precision(before)


def test_nf4_is_held_to_its_own_precision(tmp_path):
    make_llama(hidden_size=64).save_pretrained(tmp_path)
    for dtype, limit in ((torch.bfloat16, 0.25), (torch.float32, 2e-4)):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32
        )
        role_models, sampler = _actors(model), _generator()
        _draw(sampler, role_models)
        assert sampler.pads and sampler.records
        assert verification.tolerance(role_models, sampler.args) == limit


def test_the_kl_is_zero_and_the_ratio_one_before_the_first_update(tmp_path):
    """If MiniMax samples with padding, the KL is 10 nats per response or more."""
    options = {"num_mini_batches": 1, "total_episodes": 8, "per_device_train_batch_size": 8}
    prompts = Dataset.from_dict({"prompt": ["what is the " + "quick " * n for n in range(16)]})
    trainer = small_trainer(tmp_path, model=faulty("MiniMax"), dataset=prompts, **options)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert abs(logged["objective/kl"]) < 1e-3 and logged["policy/approxkl_avg"] < 1e-8
    assert logged["val/ratio"] == pytest.approx(1, abs=1e-4)
