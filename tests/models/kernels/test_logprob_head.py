"""The chunked head gives the log-probabilities, entropies and gradients of a plain softmax over all logits."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import make_gpt2, make_llama
from peft import LoraConfig
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_rlaif import SharedBase
from trl_rlaif.models.kernels import logprob_head as head_module
from trl_rlaif.models.kernels.logprob_head import is_plain, token_logprobs_of
from trl_rlaif.models.kernels.precision import cast_frozen_weights

TOKENS, WIDTH, VOCABULARY = 50, 32, 120


def _case(*, bias: bool = False, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)
    nn.init.normal_(head.weight)
    if bias:
        nn.init.normal_(head.bias)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, VOCABULARY, (TOKENS,)), torch.randn(TOKENS)


def _of_scores(scores, tokens, temperature):
    logs = (scores.double() / temperature).log_softmax(-1)
    return logs.gather(1, tokens[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def _plain(hidden, head, tokens, weights, temperature):
    """Log-probabilities, entropies, and gradients of the weighted log-probabilities by hidden, all in float64."""
    hidden = hidden.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    scores = nn.functional.linear(hidden, head.weight.double(), bias)
    logprobs, entropy = _of_scores(scores, tokens, temperature)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad


def _assert_equal(logprobs, entropy, scores, expected):
    """Equal up to float32 rounding: an entropy is a difference of two sums as large as the logits."""
    top = scores.abs().max().item()
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=0, atol=2**-21 * top)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2**-22 * top * max(1.0, top / 2))


def _relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_float32_is_the_plain_softmax(bias, temperature):
    hidden, head, tokens, weights = _case(bias=bias)
    logprobs, entropy = token_logprobs_of(hidden, head, tokens, temperature)
    (logprobs * weights).sum().backward()
    expected = _plain(hidden, head, tokens, weights, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    _assert_equal(logprobs, entropy, head(hidden) / temperature, expected)
    torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 hidden", "autocast"])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_rounds_the_scores_and_nothing_behind_them(autocast, bias):
    hidden, head, tokens, weights = _case(bias=bias, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logprobs, entropy = token_logprobs_of(hidden, head, tokens, 0.7)
        low = [None if x is None else x.bfloat16() for x in (hidden, head.weight, head.bias)]
        scores = nn.functional.linear(*low).detach()
    (logprobs * weights).sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32 and hidden.grad.dtype == hidden.dtype
    _assert_equal(logprobs, entropy, scores.float() / 0.7, _of_scores(scores, tokens, 0.7))
    # Logits up to 30 are off by up to 2**-4, and the probabilities in proportion.
    exact = _plain(hidden, head, tokens, weights, 0.7)
    assert _relative_error(hidden.grad, exact[2]) < 2**-6
    assert (logprobs - exact[0]).abs().max() < 2 * 2**-4 / 0.7


@pytest.mark.parametrize("chunk", [16, 20, 25])
def test_more_tokens_than_one_chunk(monkeypatch, chunk):
    hidden, head, tokens, weights = _case(bias=True)

    def run():
        found = token_logprobs_of(hidden, head, tokens, 1.3)
        (gradient,) = torch.autograd.grad((found[0] * weights).sum(), hidden)
        return *found, gradient

    whole, heights, product = run(), [], head_module.linear
    monkeypatch.setattr(head_module, "HEAD_ELEMENTS", chunk * VOCABULARY)
    monkeypatch.setattr(head_module, "linear", lambda x, *args: (heights.append(len(x)), product(x, *args))[1])
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=4e-6)
    assert max(heights) == chunk and sum(heights) == 2 * TOKENS  # once for the logits, once for the gradient


def test_only_the_gradient_by_hidden_is_kept():
    hidden, head, tokens, _ = _case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(tuple(x.shape)), x)[1], lambda x: x):
        learned, _ = token_logprobs_of(hidden, head, tokens, 1.0)
        assert saved == [(TOKENS, WIDTH)]
        logprobs, entropy = token_logprobs_of(hidden.detach(), head, tokens, 1.0)
    assert saved == [(TOKENS, WIDTH)]
    assert logprobs.grad_fn is None and not entropy.any()
    assert torch.equal(logprobs, learned)


def test_no_tokens():
    hidden, head, tokens, _ = _case()
    logprobs, entropy = token_logprobs_of(hidden[:0], head, tokens[:0], 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_no_tokens_still_have_a_gradient():
    """A part of a micro-batch with only empty responses goes through backward like any other."""
    hidden, head, tokens, _ = _case()
    token_logprobs_of(hidden[:0], head, tokens[:0], 1.0)[0].sum().backward()
    assert hidden.grad is None or not hidden.grad.any()


def _tiny(kind, config, **extra):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # Large weights, so that a cap or a scale visibly changes the logits.
    return kind(config(vocab_size=60, num_key_value_heads=2, initializer_range=0.3, **sizes, **ids, **extra))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config), (PhiForCausalLM, PhiConfig)]
)
def test_plain_heads(kind, config, tied):
    model = _tiny(kind, config, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not is_plain(model)  # its head is trainable
    assert is_plain(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("kind", "config", "extra"),
    [
        (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    ],
)
def test_capped_and_scaled_scores_are_not_plain(kind, config, extra):
    model = _tiny(kind, config, **extra).requires_grad_(False)
    assert not is_plain(model)
    assert not is_plain(model)  # cached


def test_adapters_below_the_head_leave_it_plain_and_one_on_it_does_not():
    shared = SharedBase(make_llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert is_plain(shared.model) and is_plain(shared.peft)
    with shared.role(None):
        assert is_plain(shared.model)
    shared.model.get_output_embeddings().weight.requires_grad_(True)
    assert not is_plain(shared.model)  # even if it was before
    on_head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    assert not is_plain(SharedBase(make_llama(), on_head).model)


def test_a_head_held_in_bfloat16_stays_plain():
    """Otherwise, every pass of a bf16 run with an untied head would compute the logits of the whole vocabulary."""
    shared = SharedBase(make_llama(), LoraConfig(r=2, target_modules="all-linear"))
    cast_frozen_weights(shared.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_plain(shared.model)


@pytest.mark.parametrize("training", [True, False])
def test_trying_it_out_changes_no_mode_and_needs_no_luck(training):
    """GPT-2 has dropout: in training mode, two passes differ."""
    model = make_gpt2().requires_grad_(False).train(training)
    random = torch.random.get_rng_state()
    assert is_plain(model)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
