"""Exact counts from a model without weights: base, adapters, gradients, optimizer states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from trl_rlaif.recipe import LoraSection

# bitsandbytes: weights in blocks of 64 with a uint8 scale each; the scales in blocks of 256 with a float32
# each; and for every weight a float32 offset, the 16 values of NF4, and the 256 of the scales' own code.
_BLOCK, _SCALE_BLOCK, _TABLES = 64, 256, 4 + 4 * 16 + 4 * 256
# What load_model leaves unquantized.
_NOT_QUANTIZED = {"lm_head", "score"}
# bitsandbytes keeps smaller tensors' states in 32 bits, and pages only larger ones.
_SMALLEST_8BIT, _SMALLEST_PAGED, _STATE_BLOCK = 4096, 100_000, 256
_ATTENTION = re.compile(r"attn|attention")
_LAST = {"o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2", "wo"}


@dataclass(frozen=True)
class Linear:
    """A linear layer: its name in the model, its dimensions, and its decoder layer, if any.

    Args:
        adaptable: Whether it may get an adapter: not in image or audio encoders.
    """

    name: str
    inputs: int
    outputs: int
    layer: int | None
    adaptable: bool = True

    @property
    def numel(self) -> int:
        """Weights, without the bias."""
        return self.inputs * self.outputs

    @property
    def in_attention(self) -> bool:
        """Whether it belongs to attention; else to the MLP."""
        return _ATTENTION.search(self.name) is not None

    @property
    def closes(self) -> bool:
        """Whether it is the last of its block: the output projection of attention, or the down projection of an MLP."""
        return self.name.rpartition(".")[2] in _LAST


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that its memory depends on.

    Args:
        numel: Number of parameters, tied ones counted once.
        linears: All linear layers, the output head among them.
        head: Name of the output head.
        head_is_tied: Whether it shares the embedding's weight.
        norms: Number of norms over the hidden state in one decoder layer.
        head_norms: Whether queries and keys are normed.
        context: Longest sequence, or None.
    """

    numel: int
    linears: tuple[Linear, ...]
    head: str
    head_is_tied: bool
    hidden: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norms: int
    head_norms: bool
    context: int | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelShape:
        """Build the model on the meta device, and count.

        Raises:
            UserError: transformers has no causal language model of this kind.
        """
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"No causal language model can be built from this configuration: {error}") from error
        return cls._of(model, config)

    @classmethod
    def _of(cls, model: Any, config: PretrainedConfig) -> ModelShape:
        text = config.get_text_config()
        head, linears = model.get_output_embeddings(), _linears(model)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        norms = [
            parameter.numel()
            for name, parameter in model.named_parameters()
            if re.search(r"\.0\..*(norm|ln_)", name) and name.endswith("weight")
        ]
        return cls(
            numel=sum({id(p): p.numel() for p in model.parameters()}.values()),
            linears=linears,
            head=next(name for name, module in model.named_modules() if module is head),
            head_is_tied=head.weight is model.get_input_embeddings().weight,
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            intermediate=_intermediate(text, linears),
            norms=norms.count(text.hidden_size),
            head_norms=head_dim != text.hidden_size and head_dim in norms,
            context=getattr(text, "max_position_embeddings", None),
        )

    @cached_property
    def quantizable(self) -> tuple[Linear, ...]:
        """The linear layers that NF4 quantizes."""
        return tuple(x for x in self.linears if not _NOT_QUANTIZED & set(x.name.split(".")))

    @cached_property
    def one_layer(self) -> tuple[Linear, ...]:
        """The linear layers of the last decoder layer, a typical one in mixed models."""
        return tuple(x for x in self.linears if x.layer == self.layers - 1)


def _linears(model: Any) -> tuple[Linear, ...]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from trl_rlaif.models.adapters import beside_text

    found, beside = [], {module for _, part in beside_text(model) for module in part.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            layer = next((int(piece) for piece in name.split(".") if piece.isdigit()), None)
            found.append(Linear(name, inputs, outputs, layer, module not in beside))
    return tuple(found)


def _intermediate(text: Any, linears: tuple[Linear, ...]) -> int:
    """Width of the MLP; for a mixture of experts, of the experts used per token."""
    down = [x.inputs for x in linears if x.layer is not None and x.closes and not x.in_attention]
    if down:
        return max(down)
    width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    return (width or 4 * text.hidden_size) * (getattr(text, "num_experts_per_tok", None) or 1)


def nf4_bytes(numel: int) -> int:
    """Bytes of a weight in NF4 with double quantization, including scales and tables."""
    scales = -(-numel // _BLOCK)
    return -(-numel // 2) + scales + 4 * -(-scales // _SCALE_BLOCK) + _TABLES


def weight_bytes(shape: ModelShape, *, nf4: bool, item: int, head: bool = True, held: bool = False) -> tuple[int, int]:
    """Bytes of the base: (quantized weights, all others).

    Args:
        nf4: Whether the linear layers are quantized.
        item: Bytes per weight that is not quantized.
        head: False excludes the output head, as in a classifier; a tied one is the embedding and stays.
        held: Whether linear layers that are not quantized are in bfloat16 whatever ``item`` is, as in PPO.
    """
    quantized = shape.quantizable if nf4 else ()
    rest = shape.numel - sum(x.numel for x in quantized)
    if not head and not shape.head_is_tied:
        rest -= shape.hidden * shape.vocab
    small = [x for x in shape.linears if x not in quantized and not (x.name == shape.head and shape.head_is_tied)]
    less = (item - 2) * sum(x.numel for x in small) if held else 0
    return sum(nf4_bytes(x.numel) for x in quantized), item * rest - less


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Args:
        targets: The linear layers that it adapts.
        rank: r.
        dropout: Dropout before it.
    """

    targets: tuple[Linear, ...]
    rank: int
    dropout: float = 0.0

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Size of each of its tensors."""
        return tuple(size for x in self.targets for size in (self.rank * x.inputs, self.rank * x.outputs))

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(self.tensors)


def adapter(shape: ModelShape, lora: LoraSection) -> Adapter:
    """The adapter that PEFT would create from a recipe's LoRA section.

    Raises:
        UserError: No linear layer has one of these names.
    """
    wanted, adaptable = lora.target_modules, [x for x in shape.linears if x.adaptable]
    if wanted == "all-linear":
        targets = [x for x in adaptable if x.name != shape.head]
    elif isinstance(wanted, str):
        targets = [x for x in adaptable if re.fullmatch(wanted, x.name)]
    else:
        targets = [x for x in adaptable if any(x.name == w or x.name.endswith(f".{w}") for w in wanted)]
    if not targets:
        names = sorted({x.name.rpartition(".")[2] for x in shape.linears})
        raise UserError(
            f"No linear layer matches model.lora.target_modules: {wanted}.",
            fix=f"The model has {', '.join(names)}.",
        )
    return Adapter(tuple(targets), lora.r, lora.dropout)


def optimizer_bytes(optim: str, tensors: tuple[int, ...]) -> tuple[int, int]:
    """Optimizer states in transformers: (bytes that stay on the GPU, bytes in paged memory).

    Args:
        optim: As in TrainingArguments. Unknown ones count as AdamW.
        tensors: Sizes of the trained tensors, in float32.
    """
    states = _states(optim)
    eight, paged = "8bit" in optim, "paged" in optim
    resident = evictable = 0
    for size in tensors:
        if eight and size >= _SMALLEST_8BIT:
            own = states * (size + 4 * -(-size // _STATE_BLOCK))
        else:
            own = 4 * states * size
        if paged and size >= _SMALLEST_PAGED:
            evictable += own
        else:
            resident += own
    return resident, evictable


def _states(optim: str) -> int:
    if "sgd" in optim or "adafactor" in optim:  # adafactor keeps only a row and a column per matrix
        return 0
    if "ademamix" in optim:
        return 3
    return 1 if "lion" in optim or "rmsprop" in optim else 2
