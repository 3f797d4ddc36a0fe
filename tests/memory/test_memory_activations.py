"""Predicted activations against the tensors that autograd saves, and against the peak of live tensors."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trl_rlaif.memory import Activations, ModelShape, Precision, adapter
from trl_rlaif.models.kernels import logprob_head
from trl_rlaif.models.kernels.fused_lora import fuse_lora
from trl_rlaif.models.kernels.precision import cast_frozen_weights
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.models.shared_model import SharedBase
from trl_rlaif.recipe import LoraSection

ROWS, LENGTH = 2, 96
SIZES = {"vocab_size": 300, "num_hidden_layers": 4, "max_position_embeddings": 512}
SMALL = SIZES | {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = SIZES | {"hidden_size": 192, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6}
# The weights' dtype, NF4, autocast, and whether the model is prepared as in the PPO loop.
KINDS = {
    "bf16": ("bfloat16", False, True, False),
    "fp32": ("float32", False, False, False),
    "fp32 autocast": ("float32", False, True, False),
    "bf16 plain": ("bfloat16", False, False, False),
    "nf4": ("bfloat16", True, True, False),
    "ppo bf16": ("bfloat16", False, True, True),
    "ppo fp32": ("float32", False, False, True),
    "ppo fp32 autocast": ("float32", False, True, True),
    "ppo nf4": ("bfloat16", True, True, True),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Makes PEFT see the GPU's autocast as on, so that it does not cast a 4-bit layer's input."""
    # With a device, the true state: torch's own context restores on exit what it read on entry.
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: asked(*device) if device else True)


def _shared(folder, kind, config, model_class=LlamaForCausalLM, targets="all-linear", checkpointing=False):
    dtype, nf4, autocast, lean = KINDS[kind]
    if nf4:
        model_class(config).save_pretrained(folder)
        model = load_model(ModelSpec(str(folder), dtype, "nf4"))
    else:
        model = model_class(config).to(getattr(torch, dtype))
    shared = SharedBase(model.requires_grad_(False), LoraConfig(r=8, target_modules=targets)).train()
    if checkpointing:
        shared.model.gradient_checkpointing_enable({"use_reentrant": False})
    if lean:  # as PPOTrainer does
        fuse_lora(shared.peft)
        if autocast:
            cast_frozen_weights(shared.model)
    return shared


def _predicted(shared, kind, targets="all-linear"):
    dtype, nf4, autocast, lean = KINDS[kind]
    shape = ModelShape.from_config(shared.model.config)
    precision = Precision(4 if dtype == "float32" else 2, autocast, nf4, lean=lean)
    return Activations(shape, adapter(shape, LoraSection(r=8, target_modules=targets)), precision)


def _inputs():
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.randint(0, 300, (ROWS, LENGTH)), "attention_mask": mask, "position_ids": positions}


def _forward(shared, kind, inputs):
    with torch.autocast("cpu", torch.bfloat16, enabled=KINDS[kind][2]):
        return shared.hidden("policy", **inputs)


def _known(shared, inputs):
    tensors = [*shared.parameters(), *shared.buffers(), *inputs.values()]
    tensors += [p.grad for p in shared.parameters() if p.grad is not None]
    return {t.untyped_storage().data_ptr() for t in tensors}


def _kept(shared, kind):
    """Bytes that a forward pass saves for the backward pass, and of its result; each storage counts once."""
    inputs, sizes, held = _inputs(), {}, []
    known = _known(shared, inputs)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in sizes:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # another storage could reuse the address of a freed one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(_forward(shared, kind, inputs))
    return sum(sizes.values())


class _Alive(TorchDispatchMode):
    """The peak bytes of live tensors, of those created inside the context."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes, self.now, self.peak = known, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage):
        if storage.data_ptr() not in self.known and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key):
        self.now -= self.sizes.pop(key)


@contextmanager
def _alive(shared, inputs):
    for parameter in shared.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # counted elsewhere
    with _Alive(_known(shared, inputs)) as alive:
        yield alive


@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "nf4" not in kind])
def test_kept_activations(tmp_path, kind, sizes):
    shared = _shared(tmp_path, kind, LlamaConfig(**sizes))
    predicted = _predicted(shared, kind).kept(ROWS, LENGTH, checkpointing=False)
    assert predicted == pytest.approx(_kept(shared, kind), rel=0.03)


@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("kind", ["nf4", "ppo nf4"])
def test_kept_activations_of_a_4_bit_base(tmp_path, kind, sizes, as_on_a_gpu):
    shared = _shared(tmp_path, kind, LlamaConfig(**sizes))
    predicted = _predicted(shared, kind).kept(ROWS, LENGTH, checkpointing=False)
    assert predicted == pytest.approx(_kept(shared, kind), rel=0.03)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"], ["gate_proj"]])
def test_kept_activations_of_fewer_adapters(tmp_path, targets):
    # The first layer keeps less below its first adapter, which matters less with more layers.
    shared = _shared(tmp_path, "bf16", LlamaConfig(**SMALL | {"num_hidden_layers": 16}), targets=targets)
    predicted = _predicted(shared, "bf16", targets).kept(ROWS, LENGTH, checkpointing=False)
    assert predicted == pytest.approx(_kept(shared, "bf16"), rel=0.05)


def test_kept_activations_with_normed_queries(tmp_path):
    shared = _shared(tmp_path, "bf16", Qwen3Config(**SMALL, head_dim=48), Qwen3ForCausalLM)
    predicted = _predicted(shared, "bf16").kept(ROWS, LENGTH, checkpointing=False)
    assert predicted == pytest.approx(_kept(shared, "bf16"), rel=0.03)


def _peak(shared, kind):
    inputs = _inputs()
    with _alive(shared, inputs) as alive:
        hidden = _forward(shared, kind, inputs)
        with shared.role("policy"):
            hidden.backward(torch.ones_like(hidden))
    return alive.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "ppo bf16", "ppo fp32 autocast"])
def test_peak_of_a_backward_pass(tmp_path, kind, sizes, checkpointing):
    shared = _shared(tmp_path, kind, LlamaConfig(**sizes), checkpointing=checkpointing)
    predicted = _predicted(shared, kind).peak(ROWS, LENGTH, checkpointing=checkpointing)
    assert predicted == pytest.approx(_peak(shared, kind), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("kind", ["nf4", "ppo nf4"])
def test_peak_of_a_backward_pass_on_a_4_bit_base(tmp_path, kind, sizes, checkpointing, as_on_a_gpu):
    shared = _shared(tmp_path, kind, LlamaConfig(**sizes), checkpointing=checkpointing)
    predicted = _predicted(shared, kind).peak(ROWS, LENGTH, checkpointing=checkpointing)
    # bitsandbytes' dequantized weights are a separate part of the plan.
    assert predicted == pytest.approx(_peak(shared, kind), rel=0.1)


@pytest.mark.parametrize("kind", ["bf16", "fp32", "bf16 plain", "ppo bf16", "ppo fp32"])
def test_peak_of_a_pass_without_gradient(tmp_path, kind):
    shared, inputs = _shared(tmp_path, kind, LlamaConfig(**WIDE)), _inputs()
    with _alive(shared, inputs) as alive, torch.no_grad():
        _forward(shared, kind, inputs)
    assert _predicted(shared, kind).live(ROWS, LENGTH) == pytest.approx(alive.peak, rel=0.1)


def test_the_cache_is_as_large_as_predicted(tmp_path):
    shared = _shared(tmp_path, "fp32", LlamaConfig(**SMALL))
    with torch.no_grad():
        cache = shared.model(**_inputs(), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert _predicted(shared, "fp32").cache(ROWS, LENGTH) == held


@pytest.mark.parametrize("gradient", [False, True])
def test_the_output_head_of_the_loop(tmp_path, gradient, monkeypatch):
    monkeypatch.setattr(logprob_head, "HEAD_ELEMENTS", 300 * 32)
    shared = _shared(tmp_path, "ppo bf16", LlamaConfig(**SMALL))
    hidden = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=gradient)
    inputs = {"hidden": hidden, "tokens": torch.randint(0, 300, (256,))}
    predicted = _predicted(shared, "ppo bf16").head(32, gradient=gradient)
    predicted += gradient * hidden.nbytes  # its gradient is computed in the same pass
    with _alive(shared, inputs) as alive, torch.autocast("cpu", torch.bfloat16):
        logprob_head.token_logprobs_of(hidden, shared.model.get_output_embeddings(), inputs["tokens"], 1.0)
    # The rest is a chunk of hidden states, which is negligible with a real vocabulary.
    assert 0 <= alive.peak - predicted < 0.1 * alive.peak + 5 * 32 * 128 * 4
