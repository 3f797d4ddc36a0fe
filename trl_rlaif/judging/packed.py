"""Forward passes over many sequences packed in one row; shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trl_rlaif.batching import Tokens, shared_prefix
from trl_rlaif.models.kernels import fastest_attention, refuse_own_mask, refuse_unknown, sliding_windows, trial, used

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Layout:
    """The attention pattern of a packed row.

    Args:
        groups: For each group the starts and ends of its segments in the row: first the tokens its sequences share,
            then each sequence's own, which attend to the prefix, the shared tokens, and themselves.
        prefix: Keys and values by layer of the prefix of all groups, (heads, P, width) each.
        keep: A list to fill with keys and values layer by layer, if they are to be kept.
        windows: Filled with every layer's sliding window.
        masks: Masks of this row so far.
    """

    groups: list[list[tuple[int, int]]]
    prefix: KeyValues | None = None
    keep: KeyValues | None = None
    windows: list[int | None] | None = None
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        """Tokens of the prefix."""
        return self.prefix[0][0].shape[1] if self.prefix else 0

    @property
    def longest(self) -> int:
        """Maximum number of tokens that a token of the row attends to."""
        lengths = [[end - start for start, end in segments] for segments in self.groups]
        return self.cached + max(shared + max(own, default=0) for shared, *own in lengths)

    def mask(self, query: torch.Tensor, seen: int, window: int | None) -> torch.Tensor:
        """(tokens, seen) additive mask for the last tokens, which attend to ``window`` tokens up to themselves."""
        count = query.shape[2]
        key = count, seen, min(window or seen, seen)
        if key not in self.masks:
            full = query.new_full((count, seen), float("-inf"))
            own = seen - count  # the column of the first of these tokens
            self.masks[key] = full.triu(own + 1) + full.tril(own - key[2])
        return self.masks[key]


@dataclass
class _Row:
    """A packed row under construction."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[list[tuple[int, int]]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def add(self, group: Sequence[Tokens], cached: int, keep: int) -> None:
        """Append a group without its first ``cached`` tokens: the shared tokens, then each sequence's own."""
        shared = shared_prefix(group, least=keep)
        segments = [self._append(group[0], cached, shared)]
        for tokens in group:
            segments.append(self._append(tokens, shared, len(tokens)))
            self.wanted += range(len(self.ids) - keep, len(self.ids))
        self.groups.append(segments)

    def _append(self, tokens: Tokens, first: int, stop: int) -> tuple[int, int]:
        start = len(self.ids)
        self.ids += tokens[first:stop]
        self.positions += range(first, stop)
        return start, len(self.ids)


# Result of each model's trial.
_tried: WeakKeyDictionary[torch.nn.Module, list[int | None] | None] = WeakKeyDictionary()
# The last one is the current row's. Shared by all threads: a backward pass on a GPU runs in a thread of its own.
_layouts: list[_Layout] = []
_NAME = "trl_rlaif_packed"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each group of a packed row, and to the prefix; the interface is transformers'."""
    refuse_unknown(more)
    refuse_own_mask(attention_mask)
    layout = _layouts[-1]
    if layout.keep is not None:
        layout.keep.append((key[0], value[0]))
    if layout.windows is not None:
        layout.windows.append(sliding_window)
    if torch.is_grad_enabled():
        prefix = layout.prefix[module.layer_idx] if layout.prefix else ()
        return _trainable(query, (key, value), prefix, layout, sliding_window, scaling), None
    cached, heads = layout.cached, key.shape[1]
    # The prefix is copied once per layer, followed by a group's shared tokens, then by each of its segments in turn:
    # attention is not computed over tokens that are not seen.
    keys, values = (key.new_empty(heads, layout.longest, x.shape[-1]) for x in (key, value))
    if layout.prefix:
        keys[:, :cached], values[:, :cached] = layout.prefix[module.layer_idx]
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for segments in layout.groups:
        behind = cached
        for i, (start, end) in enumerate(segments):
            stop = behind + end - start
            keys[:, behind:stop], values[:, behind:stop] = key[0, :, start:end], value[0, :, start:end]
            if end > start:
                q = query[:, :, start:end]
                k, v = (_heads_of(q, x[None, :, :stop]) for x in (keys, values))
                mask = layout.mask(q, stop, sliding_window)
                found = scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
                )
                output[:, start:end] = found.transpose(1, 2)
            if i == 0:
                behind = stop
    return output, None


def _heads_of(query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Keys or values; on a GPU, repeated for each query head: its fused kernels take no mask with shared heads."""
    repeats = query.shape[1] // x.shape[1]
    return x.repeat_interleave(repeats, 1) if query.is_cuda and repeats > 1 else x


def _trainable(
    query: torch.Tensor,
    row: Sequence[torch.Tensor],
    prefix: Sequence[torch.Tensor],
    layout: _Layout,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """The same with gradients, which flow to the keys and values of the row, not to those of a cached prefix."""
    # Split once: the backward pass of a slice would fill a tensor of the whole row's size for each segment.
    sizes = [end - start for segments in layout.groups for start, end in segments]
    parts = zip(*(x.split(sizes, 2) for x in (query, *(_heads_of(query, x) for x in row))), strict=True)
    cached = [[_heads_of(query, x[None])] for x in prefix] or [[], []]
    found = []
    for segments in layout.groups:
        before = cached
        for i in range(len(segments)):
            q, *own = next(parts)
            k, v = (torch.cat((*seen, x), 2) for seen, x in zip(before, own, strict=True))
            if i == 0:
                before = [[k], [v]]
            if q.shape[2]:
                whole = window is None and q.shape[2] == k.shape[2]
                mask = None if whole else layout.mask(q, k.shape[2], window) == 0
                found.append(fastest_attention(q, k, v, mask, 0.0, scaling).transpose(1, 2))
    return torch.cat(found, 1)


AttentionInterface.register(_NAME, _attention)


@contextmanager
def _packed(model: torch.nn.Module, layout: _Layout) -> Iterator[None]:
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, _NAME
    _layouts.append(layout)
    try:
        yield
    finally:
        _layouts.pop()
        config._attn_implementation = before


def packed_length(group: Sequence[Tokens], cached: int = 0) -> int:
    """Tokens that a group takes in a packed row after a cached prefix."""
    shared = shared_prefix(group)
    return shared - cached + sum(len(tokens) - shared for tokens in group)


class PackedModel:
    """A causal language model that processes groups of sequences without padding or repeated computation.

    There are three levels: a prefix of all sequences, whose keys and values are computed once and kept; the shared
    prefix within a group; and the rest of each sequence. Exact: every token attends to its own sequence only.

    Args:
        model: From transformers, with full attention or sliding windows, in eval mode.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._prefix: Tokens = ()
        self._cache: KeyValues | None = None
        self._kept: ExitStack | None = None

    @staticmethod
    def can_read(model: torch.nn.Module, longest: int) -> bool:
        """Whether packing leaves a model's results unchanged, tested once on a few tokens.

        Some architectures use attention features that are not supported here (sinks, soft caps, biases).

        Args:
            longest: Maximum sequence length in tokens. If it exceeds a sliding window, the layers that have one must
                report it; it must not exceed the chunk size of chunked attention.
        """
        config = model.config.get_text_config()
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if not used("packing", model.device) or chunk and longest > chunk:
            return False
        if model not in _tried:
            _tried[model] = PackedModel._try_out(model)
        told = _tried[model]
        if told is None or not window or longest <= window:
            return told is not None
        return told == sliding_windows(config)

    @staticmethod
    def _try_out(model: torch.nn.Module) -> list[int | None] | None:
        """Every layer's sliding window as passed to the attention, or None if packing changes the result."""
        rows = [[*range(3, 20), *ends] for ends in ((5, 9, 4), (4, 8), (7,))]
        packed = PackedModel(model)
        windows: list[int | None] = []
        with trial(model):
            try:
                packed.cache(rows[0][:6], windows=windows)
                found = packed.logits([rows[:2], rows[2:]], 1)[:, 0].float().log_softmax(-1)
            except Exception:  # whatever an architecture that does not support this attention raises
                return None
            plain = [model(input_ids=torch.tensor([row], device=found.device), use_cache=False) for row in rows]
        expected = torch.stack([out.logits[0, -1] for out in plain]).float().log_softmax(-1)
        return windows if windows and (found - expected).abs().max() < 1e-3 else None

    @property
    def cached(self) -> int:
        """Tokens of the prefix."""
        return len(self._prefix)

    @torch.no_grad()
    def cache(self, prefix: Tokens, *, windows: list[int | None] | None = None) -> None:
        """Compute the prefix, possibly empty, of all sequences from now on.

        Args:
            windows: Filled with the sliding window of every layer.
        """
        if list(prefix) == list(self._prefix):
            return
        self._prefix, self._cache = list(prefix), None
        if prefix:
            layout = _Layout([[(0, len(prefix))]], keep=[], windows=windows)
            self._forward(list(prefix), list(range(len(prefix))), [len(prefix) - 1], layout)
            self._cache = layout.keep

    @contextmanager
    def kept_packed(self) -> Iterator[None]:
        """Keep forward passes packed until exit, so that gradient checkpointing recomputes them identically.

        For one forward pass and its backward pass.
        """
        try:
            with ExitStack() as self._kept:
                yield
        finally:
            self._kept = None

    def logits(self, groups: Sequence[Sequence[Tokens]], keep: int) -> torch.Tensor:
        """Logits at the last positions of every sequence.

        Args:
            groups: Groups of sequences that share a prefix, each with the cached one and at least ``keep`` more tokens.
            keep: Number of positions.

        Returns:
            (sequences, keep, vocabulary) in the model's dtype, group by group.
        """
        row = _Row()
        for group in groups:
            row.add(group, self.cached, keep)
        logits = self._forward(row.ids, row.positions, row.wanted, _Layout(row.groups, self._cache))
        return logits.view(-1, keep, logits.shape[-1])

    def _forward(self, ids: list[int], positions: list[int], wanted: list[int], layout: _Layout) -> torch.Tensor:
        device = self.model.device
        with ExitStack() as own:
            (self._kept or own).enter_context(_packed(self.model, layout))
            return self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                logits_to_keep=torch.tensor(wanted, device=device),
                use_cache=False,
            ).logits[0]
