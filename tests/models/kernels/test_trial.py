"""A trial is exact for any dtype of the weights, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import make_family
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from trl_rlaif.judging.packed import PackedModel
from trl_rlaif.models.kernels.attention import NAME, trainable_attention
from trl_rlaif.models.kernels.trials import trial
from trl_rlaif.reward.collator import SoftPreferenceCollator
from trl_rlaif.reward.scoring import PairScorer, can_pack

IDS = torch.tensor([[5, 6, 7, 8, 9, 3]])
EXAMPLES = [
    {"chosen_ids": [5, 9, 4, 7, 8, 2], "rejected_ids": [5, 9, 4, 6]},
    {"chosen_ids": [5, 3, 2], "rejected_ids": [5, 3, 8, 8, 9, 10, 11, 12]},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["granite", "gemma3_text"])
def test_it_computes_what_a_float32_copy_computes(kind, dtype):
    model = make_family(kind).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(IDS).logits
        low = model(IDS).logits.float()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    with trial(model), trial(model):  # trials may be nested
        found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
    assert (found - expected).norm() < 0.1 * (low - expected).norm()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, weight in model.state_dict().items():
        assert weight.dtype == dtype and torch.equal(weight, before[name])


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_trial_in_float64(held):
    model = make_family("granite").to(held)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(IDS).logits
    with trial(model, torch.float64):
        found = model(IDS).logits
    assert found.dtype == torch.float64
    # Norms and rotary embeddings that are computed in float32 are so in both.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_weights_are_put_back_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)).bfloat16()
    with pytest.raises(RuntimeError), trial(model):
        model(torch.zeros(1, 4))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_adapters_take_no_part():
    model = make_family("granite").bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(IDS).logits
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with trial(peft):
        found = peft(IDS).logits
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_a_model_packs_if_it_does_in_float32(dtype):
    """With small weights, MPT's ALiBi biases change less on a few tokens than rounding to bfloat16 does."""
    for scale in (0.02, 0.2):
        for kind, packs in (("granite", True), ("mpt", False), ("mamba2", False)):
            assert PackedModel.can_read(make_family(kind, scale=scale).to(dtype), 20) == packs
        for kind, packs in (("gemma3_text", True), ("mpt", False)):
            scorer = make_family(kind, auto=AutoModelForSequenceClassification, scale=scale)
            assert can_pack(scorer.to(dtype)) == packs


@pytest.mark.parametrize("kind", ["falcon", "mpt", "granite"])
def test_attention_is_replaced_only_where_that_changes_nothing(kind):
    model = make_family(kind)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            expected = model(IDS, **inputs).logits
            with trainable_attention(model):
                assert (model.config._attn_implementation == NAME) == (kind == "granite")
                torch.testing.assert_close(model(IDS, **inputs).logits, expected, rtol=0, atol=0)
    assert model.config._attn_implementation != NAME


@pytest.mark.parametrize("learned", [False, True])
def test_what_doge_adds_to_its_mask_is_not_lost_in_packed_pairs(learned):
    """It is zero in a new model: only its gradient, and its value after training, show that it was there."""
    model = make_family("doge", auto=AutoModelForSequenceClassification).double()
    for layer in model.model.layers if learned else ():
        nn.init.normal_(layer.self_attn.A)
    assert can_pack(model)
    gradients = {}
    for packed in (True, False):
        model.zero_grad()
        batch = SoftPreferenceCollator(pad_token_id=0, packed=packed)(EXAMPLES)
        scorer = PairScorer(model, model, 8192)
        scorer(**batch).logits[:, 0].chunk(2)[0].sum().backward()
        gradients[packed] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients[True]) == set(gradients[False])
    for name, plain in gradients[False].items():
        assert (gradients[True][name] - plain).norm() <= 2e-6 * plain.norm(), name
