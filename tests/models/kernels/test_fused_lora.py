"""Optimizations of speed and memory change no result: LoRA layers, cached casts, frozen weights, attention."""

from __future__ import annotations

import copy
import weakref

import peft.tuners.lora.bnb
import peft.tuners.lora.layer
import pytest
import torch
import transformers
from helpers.tiny import make_llama
from peft import LoraConfig, get_peft_model

from trl_rlaif import SharedBase
from trl_rlaif.models.kernels import attention
from trl_rlaif.models.kernels.attention import trainable_attention, whole_attention
from trl_rlaif.models.kernels.fused_lora import cast_adapter, cast_once, fuse_lora
from trl_rlaif.models.kernels.precision import CastLinear, cast_frozen_weights, cast_head
from trl_rlaif.models.loading import keep_gradients
from trl_rlaif.models.shared_model import active_adapter

IDS = torch.tensor([[5, 6, 7, 8, 3], [9, 4, 3, 7, 11]])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {"vocab_size": 60, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3, **SIZES}


def _bfloat16(on: bool = True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def _lora(**options) -> LoraConfig:
    # Randomly initialized, so that every adapter changes the output.
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)


def _base(quantization: str, folder, dtype: torch.dtype = torch.float32):
    # bitsandbytes quantizes in blocks of 64: a narrower layer cannot be computed on a CPU.
    model = make_llama(hidden_size=64)
    if quantization == "plain":
        return model
    model.save_pretrained(folder)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return keep_gradients(load(folder, dtype=dtype, quantization_config=nf4))


def _pair(base=None, **options):
    """PEFT's model, and the same with fused layers."""
    torch.manual_seed(1)
    model = get_peft_model(base or make_llama(), _lora(**options))
    model.add_adapter("other", _lora(**options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    lean = copy.deepcopy(model)
    fuse_lora(lean)
    assert sum(type(layer).__name__.startswith("Fused") for layer in lean.modules()) == 14
    return model, lean


def _run(model, *, autocast: bool = False):
    """Logits and all gradients of one pass, by name."""
    model.zero_grad()
    torch.manual_seed(3)  # for dropout
    with _bfloat16(autocast):
        logits = model(input_ids=IDS).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    return {"": logits.detach().float()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _error(found, exact):
    """The norm of the error relative to the tensor's, averaged over all tensors."""
    return sum(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact) / len(exact)


def _assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def long_way(monkeypatch):
    """The fused layers that fell back to PEFT's own forward pass."""
    calls = []
    for kind in (peft.tuners.lora.layer.Linear, peft.tuners.lora.bnb.Linear4bit):

        def forward(self, *args, _original=kind.forward, **kwargs):
            calls.extend([self] if type(self).__name__.startswith("Fused") else [])
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    return calls


@pytest.mark.parametrize("quantization", ["plain", "nf4"])
def test_lean_layers_equal_pefts(quantization, long_way, tmp_path):
    model, lean = _pair(_base(quantization, tmp_path))
    expected, found = _run(model), _run(lean)
    assert len(expected) == 1 + 28
    _assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), active_adapter(model, "other"), active_adapter(lean, "other"):
        other = lean(IDS).logits
        torch.testing.assert_close(other, model(IDS).logits, rtol=1e-5, atol=1e-5)
        assert (other - found[""]).abs().max() > 0.1
    assert not long_way


@pytest.mark.parametrize("quantization", ["plain", "nf4"])
def test_lean_layers_are_no_less_exact_in_bfloat16(quantization, long_way, tmp_path):
    exact = _run(_pair(_base(quantization, tmp_path))[0])
    # A 4-bit base keeps its other weights in bfloat16, as the recipes load it.
    model, lean = _pair(_base(quantization, tmp_path, torch.bfloat16))
    found, rounded = _run(lean, autocast=True), _run(model, autocast=True)
    assert not long_way
    assert 0 < _error(found, exact) < 1.05 * _error(rounded, exact)


def test_without_adapters_lean_layers_are_the_base(long_way):
    _, lean = _pair()
    with torch.no_grad(), active_adapter(lean, None):
        assert torch.equal(lean(IDS).logits, make_llama()(IDS).logits) and not long_way


FALLBACKS = {
    "two adapters": ({}, lambda model: model.base_model.set_adapter(["default", "other"])),
    "dropout": ({"lora_dropout": 0.5}, lambda model: model.train()),
    "dora": ({"use_dora": True}, lambda model: None),
    "bias": ({"lora_bias": True}, lambda model: None),
    "merged": ({}, lambda model: model.merge_adapter()),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_plain_lora_goes_pefts_way(name, autocast, long_way):
    options, change = FALLBACKS[name]
    model, lean = _pair(**options)
    before = lean(IDS).logits
    for one in (model, lean):
        change(one)
    long_way.clear()
    with torch.set_grad_enabled(name != "merged"), _bfloat16(autocast):
        torch.manual_seed(3)
        expected = model(IDS).logits
        torch.manual_seed(3)
        found = lean(IDS).logits
    assert torch.equal(found, expected) and len(long_way) == 14
    if name == "dropout":
        assert (found - before).abs().max() > 0.1
        long_way.clear()
        lean.eval()(IDS)
        assert not long_way  # no dropout outside of training


def test_one_cast_for_all_that_read_the_same_tensor():
    x = torch.randn(3, 4, requires_grad=True) * 1
    assert cast_once(x) is x  # outside of autocast
    with _bfloat16():
        first = cast_once(x)
        assert first.dtype == torch.bfloat16 and torch.equal(first, x.bfloat16())
        assert cast_once(x) is first
        assert cast_once(first) is first
        assert cast_once(x.clone()) is not first
        with torch.no_grad():
            assert not cast_once(x).requires_grad
        again = cast_once(x)
        assert again.requires_grad
        with torch.no_grad():
            x.add_(1)
        assert cast_once(x) is not again and torch.equal(cast_once(x), x.bfloat16())


def test_a_cast_goes_with_its_source():
    x = torch.randn(3, 4)
    with _bfloat16():
        known = weakref.ref(cast_once(x))
        assert known() is not None
        del x
        assert known() is None


def _cast(kind: str, *, tied: bool):
    """A shared base; query, key and value layers have a bias in Qwen2, but not in Llama."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONFIG, tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return SharedBase(model, _lora()).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_held_weights_change_nothing_under_autocast(kind, tied):
    shared = _cast(kind, tied=tied)
    weights = {n: p.detach().clone() for n, p in shared.named_parameters()}
    linear = [n for n in weights if n.endswith(("base_layer.weight", "lm_head.weight"))]
    expected = _run(shared.peft, autocast=True)
    cast_frozen_weights(shared.model)
    assert len(linear) == 14 + (not tied)
    assert all(2 * p.nbytes == weights[n].nbytes for n, p in shared.named_parameters() if n in linear)
    _assert_close(_run(shared.peft, autocast=True), expected, rtol=0, atol=0)
    for name, parameter in shared.named_parameters():
        # (A bias is small enough to be in either dtype.)
        assert name.endswith("bias") or parameter.dtype == (torch.bfloat16 if name in linear else torch.float32)
        assert torch.equal(parameter.float(), weights[name].to(parameter.dtype).float())
        assert parameter.requires_grad == (".policy." in name)
    assert (type(shared.model.get_output_embeddings()) is CastLinear) != tied


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_held_weights_work_outside_of_autocast(kind):
    shared = _cast(kind, tied=False)
    expected = shared.model(IDS).logits
    cast_frozen_weights(shared.model)
    found = shared.model(IDS).logits
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 2**-5 * expected.norm()
    assert shared.model.lm_head(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_tied_head_is_held_for_a_while():
    model = _cast("Llama", tied=True).model
    head, before = model.get_output_embeddings(), model.get_input_embeddings().weight
    with cast_head(model):
        assert head.weight is before  # outside of autocast there is nothing to save
    with _bfloat16():
        expected = model(IDS).logits
        with cast_head(model):
            assert head.weight.dtype == torch.bfloat16 and model.get_input_embeddings().weight is before
            assert torch.equal(model(IDS).logits, expected)
        assert head.weight is before
        with pytest.raises(RuntimeError), cast_head(model):
            raise RuntimeError
        assert head.weight is before


def test_attention_for_training_is_nearer_to_the_truth():
    model, eager = get_peft_model(make_llama(), _lora()), make_llama()
    eager.set_attn_implementation("eager")
    exact, rounded = _run(model), _run(model, autocast=True)
    with trainable_attention(model.get_base_model(), eager):
        assert model.config._attn_implementation not in ("sdpa", "eager")
        assert eager.config._attn_implementation == "eager"
        found = _run(model, autocast=True)
    assert model.config._attn_implementation == "sdpa"
    assert 0 < _error(found, exact) < 1.05 * _error(rounded, exact) < 0.1
    with pytest.raises(RuntimeError), trainable_attention(model.get_base_model()):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("ways", [(128, 256), (0, 256), (0, 0)])  # whole products, torch in float32, plain torch
def test_every_way_of_attention_gives_the_same_gradients(ways, monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_UP_TO", ways[0])
    monkeypatch.setattr(attention, "FLOAT32_UP_TO", ways[1])
    model = get_peft_model(make_llama(), _lora())
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    exact = _gradients(model, mask)
    with trainable_attention(model.get_base_model()), _bfloat16():
        found = _gradients(model, mask)
    assert 0 < (found - exact).norm() < 2**-4 * exact.norm()  # torch alone: 0.044


def _gradients(model, mask) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = (model(IDS, attention_mask=mask).logits.float() * mask[..., None]).square().sum()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("masked", [False, True])
def test_whole_attention_is_exact(masked):
    query, key, value = (torch.randn(2, heads, 7, 4, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    if masked:  # left padding; its own rows see everything, as in transformers
        mask[0, :, :, :3], mask[0, :, :3] = False, True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    found = whole_attention(query, key, value, attention._bias(mask if masked else None, 7), 0.3)
    direction = torch.randn_like(expected)
    inputs = (query, key, value)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, direction)),
        (expected, *torch.autograd.grad(expected, inputs, direction)),
        strict=True,
    )
    assert all(torch.allclose(f, e, rtol=0, atol=2e-6) for f, e in pairs)  # scores and softmax are float32


@torch.no_grad()
def test_a_held_adapter_computes_the_same_to_the_last_bit():
    model = get_peft_model(make_llama(), _lora()).eval()
    model.add_adapter("other", _lora())
    fuse_lora(model)
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    with _bfloat16():
        for name in ("default", "other", None):
            with active_adapter(model, name):
                expected = model(IDS).logits
                with cast_adapter(model):
                    assert all((layer._cast is not None) == (name is not None) for layer in layers)
                    assert torch.equal(model(IDS).logits, expected)
                assert all(layer._cast is None for layer in layers)
        with pytest.raises(RuntimeError), cast_adapter(model):
            raise RuntimeError
    assert all(layer._cast is None for layer in layers)
    with cast_adapter(model):  # outside of autocast there is nothing to save
        assert all(layer._cast is None for layer in layers)


@pytest.mark.parametrize("kind", ["encoder", "narrow values"])
def test_attention_that_is_not_the_usual_one_stays_what_it_is(kind):
    """An encoder's tokens see all others, with a mask or without; values may be narrower than keys."""
    torch.manual_seed(0)
    if kind == "encoder":
        config = transformers.BertConfig(vocab_size=60, **SIZES)
        model = transformers.BertForSequenceClassification(config).eval()
    else:
        config = transformers.DeepseekV3Config(
            vocab_size=60, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, **SIZES,
        )  # fmt: skip
        model = transformers.DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad(), _bfloat16():
        expected = model(input_ids=IDS).logits
        with trainable_attention(model):
            found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
