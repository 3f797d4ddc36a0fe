"""Formulas for the memory of forward and backward passes through decoder layers like Llama's.

Derived from the tensors that autograd saves in Llama, Qwen, Mistral and Gemma layers of transformers 5 with LoRA (PEFT
0.21's, and the PPO loop's leaner one) under torch 2.13; a test compares them with the tensors actually saved. A token
is a computed position, including padding. Attention is a fused kernel (flash or memory-efficient): S x S scores are
never stored, only the mask is. Sequences are padded, so there is a mask, and transformers repeats keys and values for
every query head before the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_rlaif.memory.counting import Adapter, ModelShape

FLOAT32 = 4


@dataclass(frozen=True)
class Precision:
    """Bytes per element in each place; adapters are float32.

    Args:
        stream: For the residual stream, and for all weights that are not quantized.
        autocast: Whether matrix products are computed in bfloat16, whatever the weights' dtype.
        quantized: Whether the base is NF4.
        lean: Whether adapters and frozen weights are handled as in the PPO loop: under autocast, an input shared by
            several layers is cast once, and frozen linear layers are stored in bfloat16.
    """

    stream: int
    autocast: bool
    quantized: bool
    lean: bool = False

    @property
    def linear(self) -> int:
        """For a linear layer's output; a 4-bit one returns its input's dtype."""
        return 2 if self.autocast and (self.lean or not self.quantized) else self.stream

    @property
    def attention(self) -> int:
        """For queries, keys and values in the kernel."""
        return 2 if self.autocast else self.linear

    @property
    def lora(self) -> int:
        """For the product with a LoRA factor."""
        return 2 if self.autocast else FLOAT32

    @property
    def copies_input(self) -> bool:
        """Whether each adapter keeps a copy of its input.

        PEFT casts it to the adapter's dtype first (except before a 4-bit layer under autocast), and
        autocast casts it again.
        """
        if self.autocast and self.lean:
            return False
        if self.autocast and self.quantized:
            return self.stream != self.lora
        return self.stream != FLOAT32 or self.autocast


@dataclass(frozen=True)
class Activations:
    """Bytes used by passes of one model with one active adapter.

    Args:
        shape: The model.
        adapter: The active adapter, if any.
        precision: The dtypes.
    """

    shape: ModelShape
    adapter: Adapter | None
    precision: Precision

    # ---- A training pass ------------------------------------------------------------------------------

    def kept(self, rows: int, length: int, *, checkpointing: bool) -> int:
        """Memory that the layers' forward pass saves for the backward pass.

        Args:
            rows: Sequences.
            length: Tokens of each, padding included.
            checkpointing: Whether one hidden state per layer is kept and the rest recomputed.
        """
        tokens, shape = rows * length, self.shape
        if checkpointing:
            return tokens * (shape.layers * self.precision.stream * shape.hidden + self._ends(length))
        # Nothing below the first adapter has a gradient, so the first norm saves nothing.
        layers = shape.layers * self._layer(length) - self._norm()
        return tokens * (layers + self._ends(length)) + shape.layers * self._weight_copies()

    def peak(self, rows: int, length: int, *, checkpointing: bool) -> int:
        """Peak memory of the layers' backward pass, including what the forward pass saved."""
        tokens, kept = rows * length, self.kept(rows, length, checkpointing=checkpointing)
        if checkpointing:
            kept += tokens * self._layer(length) + self._weight_copies()
        return kept + tokens * self._passing(checkpointing)

    def _layer(self, length: int) -> int:
        """Bytes per token saved by one layer."""
        shape, p = self.shape, self.precision
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        saved = shape.norms * self._norm()
        if shape.head_norms:
            saved += FLOAT32 * (queries + keys + shape.heads + shape.kv_heads)
        # The kernel: queries, repeated keys and values, output; each head's log-sum-exp; the mask's row.
        saved += p.attention * (4 * queries + length) + FLOAT32 * shape.heads
        mlp = [x for x in shape.one_layer if not x.in_attention]
        ungated = mlp and sum(x.outputs for x in mlp if not x.closes) < 2 * shape.intermediate
        # Gate, gate after its activation, and up; without a gate, the activation's input.
        return saved + p.linear * shape.intermediate * (1 if ungated else 3) + self._lora()

    def _lora(self) -> int:
        """Bytes per token saved by the adapters of one layer: inputs, and low-rank products."""
        if self.adapter is None:
            return 0
        targets = [x for x in self.shape.one_layer if x in set(self.adapter.targets)]
        saved = self.adapter.rank * self.precision.lora * len(targets)
        if self.adapter.dropout:  # a one-byte mask, and the input after dropout
            return saved + sum((1 + self.precision.lora) * x.inputs for x in targets)
        if self.precision.copies_input:
            return saved + sum(self.precision.lora * x.inputs for x in targets)
        saved += sum(self.precision.linear * x.inputs for x in targets if x.closes and not x.in_attention)
        # Queries, keys and values read one norm's output, gate and up the other's: each is saved once.
        readers = {x.in_attention: x.inputs for x in targets if not x.closes}
        return saved + min(self.precision.stream, self.precision.lora) * sum(readers.values())

    def _norm(self) -> int:
        return FLOAT32 * (self.shape.hidden + 1)

    def _ends(self, length: int) -> int:
        """Last norm and its output, the rotary tables, and the mask passed to every layer."""
        return self._norm() + self.precision.stream * (self.shape.hidden + 2 * self.shape.head_dim) + length

    def _passing(self, checkpointing: bool) -> int:
        """Bytes per token that the backward pass adds to what is saved, at its peak.

        The factors are empirical: they predict the peaks of small Llamas within 10%.
        """
        shape, p = self.shape, self.precision
        wide, narrow = p.linear * shape.intermediate, p.stream * shape.hidden
        if p.copies_input and self._on_mlp(closing=True):
            # The down projection: its input, and a copy in the adapter's dtype.
            return wide + FLOAT32 * shape.intermediate + 4 * narrow
        # Besides gate and up, what their adapters add.
        layer = (3 * wide + 5 * narrow) // 2
        # Without recomputation, the last norm's float32 gradients are added while everything is still saved.
        return layer if checkpointing else max(layer, (5 * FLOAT32 + p.stream) * shape.hidden)

    def _on_mlp(self, *, closing: bool) -> bool:
        if self.adapter is None:
            return False
        return any(not x.in_attention and (x.closes or not closing) for x in self.adapter.targets)

    def _weight_copies(self) -> int:
        """Copies of one layer's weights that autocast casts and the graph keeps."""
        if not self.precision.autocast:
            return 0
        copies = 0
        if self.adapter is not None:
            mine = set(self.shape.one_layer)
            copies += 2 * sum(self.adapter.rank * (x.inputs + x.outputs) for x in self.adapter.targets if x in mine)
        if self.precision.stream == FLOAT32 and not (self.precision.quantized or self.precision.lean):
            copies += 2 * sum(x.numel for x in self.shape.one_layer)
        return copies

    # ---- Passes without gradient ----------------------------------------------------------------------

    def live(self, rows: int, length: int) -> int:
        """Peak memory of a forward pass without gradient, without the output head."""
        shape, p = self.shape, self.precision
        # Gate, up and their product; PEFT's adapters hold one more.
        wide = (4 if self._on_mlp(closing=False) and not p.lean else 3) * p.linear
        if p.copies_input and not p.autocast and self._on_mlp(closing=True):
            wide += FLOAT32
        narrow = 4 * p.stream + (FLOAT32 if p.copies_input and self.adapter is not None else 0)
        # Autocast casts each adapter weight once and keeps it until its context ends.
        copies = 2 * self.adapter.numel if self.adapter is not None and p.autocast else 0
        return rows * length * (wide * shape.intermediate + narrow * shape.hidden + length) + copies

    def cache(self, rows: int, length: int) -> int:
        """Keys and values of all layers, (rows, length) tokens."""
        return (
            rows * length * self.shape.layers * 2 * self.shape.kv_heads * self.shape.head_dim * self.precision.attention
        )

    def step_logits(self, rows: int) -> int:
        """One step of generation: logits as computed, in float32, at the temperature, and as log-probabilities."""
        return rows * self.shape.vocab * (self.precision.attention + 3 * FLOAT32) + self._head_copy()

    # ---- The output head ------------------------------------------------------------------------------

    def head(self, tokens: int, *, gradient: bool) -> int:
        """Logits of a chunk of tokens: as computed, and two copies in float32; with gradient, three."""
        logits = tokens * self.shape.vocab * (self.precision.attention + (3 if gradient else 2) * FLOAT32)
        return logits + self._head_copy()

    def sft_head(self, tokens: int) -> int:
        """TRL's chunked loss: the head's weight in float32, and a chunk of logits with what cross entropy needs."""
        weight = self.shape.vocab * self.shape.hidden * (FLOAT32 + (2 if self.precision.autocast else 0))
        return weight + tokens * self.shape.vocab * (self.precision.attention + 4 * FLOAT32)

    def _head_copy(self) -> int:
        """A bfloat16 copy of the head's weight, unless stored so: the PPO loop does not cast a tied one."""
        held = self.precision.lean and not self.shape.head_is_tied
        converts = self.precision.autocast and self.precision.stream == FLOAT32 and not held
        return 2 * self.shape.vocab * self.shape.hidden if converts else 0
