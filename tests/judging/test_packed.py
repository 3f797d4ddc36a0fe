"""Many sequences packed into one row against each of them alone, and which models can be packed."""

from __future__ import annotations

import pytest
import torch
from helpers.judges import MODELS, llama, mistral
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from trl_rlaif.judging.packed import PackedModel, packed_length

PACKING = ["llama", "qwen2", "gpt-neox", "gpt2", "wide window", "narrow window", "mixed windows"]
TOLERANCE = 2e-5  # nats; the actual error is about 5e-6


def drawn(length, seed):
    return torch.randint(0, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = drawn(30, 1)
GROUPS = {
    "alone": [[drawn(9, 2)]],
    "a pair": [[[*drawn(20, 2), *drawn(5, 3)], [*drawn(20, 2), *drawn(8, 4)]]],
    "three, one within another": [[drawn(20, 2), drawn(20, 2)[:7], [*drawn(20, 2), *drawn(4, 5)]]],
    "the same twice": [[drawn(12, 2), drawn(12, 2)]],
    "several groups": [
        [drawn(9, 2)],
        [[*drawn(20, 3), *drawn(5, 4)], [*drawn(20, 3), *drawn(8, 5)]],
        [drawn(3, 6), drawn(25, 7)],
    ],
}


@pytest.fixture(scope="module")
def models():
    return {name: MODELS[name]() for name in PACKING}


@torch.no_grad()
def plain(model, groups, keep):
    rows = [model(torch.tensor([tokens])).logits[0, -keep:] for group in groups for tokens in group]
    return torch.stack(rows).double().log_softmax(-1)


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("cached", [0, 1, 30])
@pytest.mark.parametrize("gradients", [False, True])
def test_packed_logits_are_those_of_each_sequence_alone(models, name, keep, cached, gradients):
    model = models[name]
    packed = PackedModel(model)
    packed.cache(PREFIX[:cached])
    assert packed.cached == cached
    for case, groups in GROUPS.items():
        whole = [[[*PREFIX, *tokens] for tokens in group] for group in groups]
        with torch.set_grad_enabled(gradients):
            found = packed.logits(whole, keep)
        assert found.dtype == model.dtype and found.requires_grad == gradients
        expected = plain(model, whole, keep)
        assert found.shape == expected.shape
        difference = (found.detach().double().log_softmax(-1) - expected).abs().max().item()
        assert difference < TOLERANCE, case
    assert expected.std() > 0.1


def test_a_new_prefix_replaces_the_old_one(models):
    packed = PackedModel(models["llama"])
    for prefix in (PREFIX, PREFIX[:17], [], drawn(25, 9)):
        packed.cache(prefix)
        rows = [[[*prefix, *drawn(6, 2)], [*prefix, *drawn(7, 3)]]]
        difference = packed.logits(rows, 1).double().log_softmax(-1) - plain(models["llama"], rows, 1)
        assert difference.abs().max() < TOLERANCE and packed.cached == len(prefix)


def test_the_models_own_attention_comes_back(models):
    model = models["llama"]
    before = model.config._attn_implementation
    packed = PackedModel(model)
    packed.cache(PREFIX)
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):  # an id outside the vocabulary
        packed.logits([[[*PREFIX, 400]]], 1)
    assert model.config._attn_implementation == before
    with pytest.raises(LookupError):  # outside a pass, the packed attention has no layout
        model.config._attn_implementation = "trl_rlaif_packed"
        try:
            model(torch.tensor([PREFIX]))
        finally:
            model.config._attn_implementation = before


# ---- Which models can be packed -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKING)
def test_these_can_be_packed(models, name):
    assert PackedModel.can_read(models[name], 1000)


def test_a_window_that_sequences_exceed_must_be_told_to_the_attention():
    for model in (mistral(window=40), MODELS["mixed windows"]()):
        assert all(PackedModel.can_read(model, length) for length in (40, 41, 1000))
    silent = llama()
    silent.config.sliding_window = 40
    assert [PackedModel.can_read(silent, length) for length in (40, 41)] == [True, False]


def test_chunks_of_attention_count_as_a_window():
    model = llama()
    model.config.attention_chunk_size = 100
    assert [PackedModel.can_read(model, length) for length in (100, 101)] == [True, False]


_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def sinks():
    return GptOssForCausalLM(GptOssConfig(num_local_experts=2, num_experts_per_tok=1, **_SHAPE))


def soft_cap():
    """The cap is too high to make a difference on a few tokens: its presence is enough."""
    return Gemma2ForCausalLM(Gemma2Config(attn_logit_softcapping=1e4, **_SHAPE))


def biases():
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [sinks, soft_cap, biases])
def test_what_adds_to_the_attention_is_not_packed(make):
    torch.manual_seed(0)
    assert not PackedModel.can_read(make().eval(), 50)


def test_a_model_of_numbers_that_are_not_finite_is_not_packed():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    assert not PackedModel.can_read(model, 50)


def test_packed_length_counts_what_is_shared_once():
    group = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]]
    assert packed_length(group) == 2 + 2 + 1 + 3
    assert packed_length(group, cached=1) == packed_length(group) - 1
