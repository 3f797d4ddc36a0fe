"""Formulas of what forward and backward passes keep, for decoder layers like Llama's.

Counted from what autograd saves in Llama, Qwen, Mistral and Gemma layers of transformers 5 with LoRA, PEFT 0.21's
and the PPO loop's leaner one, under torch 2.13; a test compares them with the tensors that it really saves. "A token"
is a position that is computed, padding included. Attention is a fused kernel (flash or memory-efficient): scores of
S x S are never kept, only the mask is. Sequences are padded, so that there is a mask, and transformers repeats keys
and values for every query head in front of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_rlaif.memory.counting import Adapter, ModelShape

FLOAT32 = 4


@dataclass(frozen=True)
class Precision:
    """Bytes of a number in each place; adapters are float32.

    Args:
        stream: Of the residual stream, and of all weights that are not quantized.
        autocast: Whether products are computed in bfloat16 whatever the weights are.
        quantized: Whether the base is NF4.
        lean: Whether adapters and frozen weights are held as the PPO loop holds them: under autocast the input of
            several layers is converted once for all, and frozen linear layers are in bfloat16 to begin with.
    """

    stream: int
    autocast: bool
    quantized: bool
    lean: bool = False

    @property
    def linear(self) -> int:
        """Of what a linear layer gives; a 4-bit one gives what it was given."""
        return 2 if self.autocast and (self.lean or not self.quantized) else self.stream

    @property
    def attention(self) -> int:
        """Of queries, keys and values in the kernel."""
        return 2 if self.autocast else self.linear

    @property
    def lora(self) -> int:
        """Of a LoRA factor's product."""
        return 2 if self.autocast else FLOAT32

    @property
    def copies_input(self) -> bool:
        """Whether each adapter keeps a copy of its input.

        PEFT converts it to the adapter's type first (but in front of a 4-bit layer under autocast), and
        autocast converts it again.
        """
        if self.autocast and self.lean:
            return False
        if self.autocast and self.quantized:
            return self.stream != self.lora
        return self.stream != FLOAT32 or self.autocast


@dataclass(frozen=True)
class Activations:
    """Bytes kept by passes of one model with one adapter active.

    Args:
        shape: The model.
        adapter: None for a pass without.
        precision: The types.
    """

    shape: ModelShape
    adapter: Adapter | None
    precision: Precision

    # ---- A training pass ------------------------------------------------------------------------------

    def kept(self, rows: int, length: int, *, checkpointing: bool) -> int:
        """What the forward pass of the layers leaves for the backward pass.

        Args:
            rows: Sequences.
            length: Tokens of each, padding included.
            checkpointing: Whether one hidden state a layer is kept and the rest computed again.
        """
        tokens, shape = rows * length, self.shape
        if checkpointing:
            return tokens * (shape.layers * self.precision.stream * shape.hidden + self._ends(length))
        # Nothing below the first adapter has a gradient, so the first norm keeps nothing.
        layers = shape.layers * self._layer(length) - self._norm()
        return tokens * (layers + self._ends(length)) + shape.layers * self._weight_copies()

    def peak(self, rows: int, length: int, *, checkpointing: bool) -> int:
        """The most that is alive in the backward pass of the layers, what the forward pass left included."""
        tokens, kept = rows * length, self.kept(rows, length, checkpointing=checkpointing)
        if checkpointing:
            kept += tokens * self._layer(length) + self._weight_copies()
        return kept + tokens * self._passing(checkpointing)

    def _layer(self, length: int) -> int:
        """A token's share of what one layer saves."""
        shape, p = self.shape, self.precision
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        saved = shape.norms * self._norm()
        if shape.head_norms:
            saved += FLOAT32 * (queries + keys + shape.heads + shape.kv_heads)
        # The kernel: queries, repeated keys and values, result; the log-sum of each head; the mask's row.
        saved += p.attention * (4 * queries + length) + FLOAT32 * shape.heads
        mlp = [x for x in shape.one_layer if not x.in_attention]
        ungated = mlp and sum(x.outputs for x in mlp if not x.closes) < 2 * shape.intermediate
        # Gate, gate after its activation, and up; without a gate, what the activation was given.
        return saved + p.linear * shape.intermediate * (1 if ungated else 3) + self._lora()

    def _lora(self) -> int:
        """A token's share of what the adapters of one layer save: inputs, and the narrow products."""
        if self.adapter is None:
            return 0
        targets = [x for x in self.shape.one_layer if x in set(self.adapter.targets)]
        saved = self.adapter.rank * self.precision.lora * len(targets)
        if self.adapter.dropout:  # a mask of a byte, and the input less what was dropped
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
        """Last norm and its output, the rotary tables, and the mask as it is given to every layer."""
        return self._norm() + self.precision.stream * (self.shape.hidden + 2 * self.shape.head_dim) + length

    def _passing(self, checkpointing: bool) -> int:
        """A token's share of what the busiest moment of the backward pass adds to what is saved.

        The factors are measured: with them the peaks of small Llamas come out within a tenth.
        """
        shape, p = self.shape, self.precision
        wide, narrow = p.linear * shape.intermediate, p.stream * shape.hidden
        if p.copies_input and self._on_mlp(closing=True):
            # The way down: its input, and that in the adapter's type.
            return wide + FLOAT32 * shape.intermediate + 4 * narrow
        # Beside gate and up, what their adapters add.
        layer = (3 * wide + 5 * narrow) // 2
        # Where layers are not computed again, the last norm's gradients in float32 meet all that is saved.
        return layer if checkpointing else max(layer, (5 * FLOAT32 + p.stream) * shape.hidden)

    def _on_mlp(self, *, closing: bool) -> bool:
        if self.adapter is None:
            return False
        return any(not x.in_attention and (x.closes or not closing) for x in self.adapter.targets)

    def _weight_copies(self) -> int:
        """Weights of one layer that autocast converts and the graph holds."""
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
        """The most that is alive in a forward pass without gradient, without the output head."""
        shape, p = self.shape, self.precision
        # Gate, up and their product; PEFT's adapters hold one more.
        wide = (4 if self._on_mlp(closing=False) and not p.lean else 3) * p.linear
        if p.copies_input and not p.autocast and self._on_mlp(closing=True):
            wide += FLOAT32
        narrow = 4 * p.stream + (FLOAT32 if p.copies_input and self.adapter is not None else 0)
        # Autocast converts each adapter weight once and keeps it until its context ends.
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
        """Logits of a chunk of tokens: as computed and two in float32; with gradient one more."""
        logits = tokens * self.shape.vocab * (self.precision.attention + (3 if gradient else 2) * FLOAT32)
        return logits + self._head_copy()

    def sft_head(self, tokens: int) -> int:
        """TRL's chunked loss: the head's weight in float32, and a chunk of logits with what cross entropy needs."""
        weight = self.shape.vocab * self.shape.hidden * (FLOAT32 + (2 if self.precision.autocast else 0))
        return weight + tokens * self.shape.vocab * (self.precision.attention + 4 * FLOAT32)

    def _head_copy(self) -> int:
        """The head's weight in bfloat16, where it is not held so: the loop leaves one that is the embedding's."""
        held = self.precision.lean and not self.shape.head_is_tied
        converts = self.precision.autocast and self.precision.stream == FLOAT32 and not held
        return 2 * self.shape.vocab * self.shape.hidden if converts else 0
