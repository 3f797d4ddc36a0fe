"""Forward passes over many sequences in one row, in which what sequences begin with is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

Tokens = Sequence[int]
KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Layout:
    """Who sees whom in a packed row.

    Args:
        prefix: Keys and values by layer of what stands before every group, (heads, P, width) each.
        spans: Start and end of each group in the row.
        masks: For each group (its tokens, P + its tokens), added to the attention scores.
        keep: Where keys and values are to be kept, a list that is filled layer by layer.
    """

    spans: list[tuple[int, int]]
    masks: list[torch.Tensor]
    prefix: KeyValues | None = None
    keep: KeyValues | None = None


@dataclass
class _Row:
    """A packed row under construction."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    segments: list[list[tuple[int, int]]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def add(self, group: Sequence[Tokens], cached: int, keep: int) -> None:
        """A group of sequences without their first ``cached`` tokens: what they share, then each one's own."""
        start = len(self.ids)
        shared = shared_prefix(group, least=keep)
        self.ids += group[0][cached:shared]
        self.positions += range(cached, shared)
        segments = [(0, shared - cached)]
        for tokens in group:
            begin = len(self.ids) - start
            self.ids += tokens[shared:]
            self.positions += range(shared, len(tokens))
            segments.append((begin, len(self.ids) - start))
            self.wanted += range(len(self.ids) - keep, len(self.ids))
        self.spans.append((start, len(self.ids)))
        self.segments.append(segments)


# What a trial of each model's architecture said.
_tried: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
_layout: ContextVar[_Layout] = ContextVar("_layout")
_NAME = "trl_rlaif_packed"
# What models hand to their attention that changes nothing here.
_HARMLESS = {"dropout", "is_causal", "output_attentions", "position_ids", "sliding_window", "use_cache"}


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each group of a packed row, and to the prefix; the interface is transformers'."""
    unknown = {name for name, value in more.items() if value is not None and value is not False} - _HARMLESS
    if unknown:  # such as a soft cap: on a few tokens it may make a difference too small to be seen
        raise NotImplementedError(f"attention with {', '.join(sorted(unknown))}")
    layout = _layout.get()
    if layout.keep is not None:
        layout.keep.append((key[0], value[0]))
    before = layout.prefix[module.layer_idx] if layout.prefix else None
    repeat = query.shape[1] // key.shape[1]
    cached = before[0].shape[1] if before is not None else 0
    # The prefix is copied once a layer, and each group's own keys and values behind it.
    longest = cached + max(end - start for start, end in layout.spans)
    keys, values = (key.new_empty(key.shape[1], longest, x.shape[-1]) for x in (key, value))
    if before is not None:
        keys[:, :cached], values[:, :cached] = before
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for (start, end), mask in zip(layout.spans, layout.masks, strict=True):
        stop = cached + end - start
        keys[:, cached:stop], values[:, cached:stop] = key[0, :, start:end], value[0, :, start:end]
        k, v = keys[None, :, :stop], values[None, :, :stop]
        if repeat > 1 and query.is_cuda:  # its fused kernels take no mask together with shared heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        found = scaled_dot_product_attention(
            query[:, :, start:end],
            k,
            v,
            attn_mask=mask.to(query.dtype),
            scale=scaling,
            enable_gqa=k.shape[1] != query.shape[1],
        )
        output[:, start:end] = found.transpose(1, 2)
    return output, None


AttentionInterface.register(_NAME, _attention)


@contextmanager
def _packed(model: torch.nn.Module, layout: _Layout) -> Iterator[None]:
    config = model.config
    before, token = config._attn_implementation, _layout.set(layout)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _layout.reset(token)


def shared_prefix(rows: Sequence[Tokens], least: int = 1) -> int:
    """How many tokens all rows begin with; at least ``least`` tokens of each row stay outside."""
    first, last = min(rows), max(rows)  # in lexicographic order these two differ the earliest
    same = sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(first, last, strict=False)))
    return max(0, min(same, min(map(len, rows)) - least))


def packed_length(group: Sequence[Tokens], cached: int = 0) -> int:
    """Tokens that a group takes in a packed row behind a cached prefix."""
    shared = shared_prefix(group)
    return shared - cached + sum(len(tokens) - shared for tokens in group)


def packed_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches whose lengths add up to at most a token budget.

    The longest come first (memory trouble shows at once); one that exceeds the budget is a batch of its own.
    The result depends on the lengths alone.
    """
    batches: list[list[int]] = []
    free = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[i] > free:
            batches.append([])
            free = budget
        batches[-1].append(i)
        free -= lengths[i]
    return batches


class PackedModel:
    """A causal language model that reads groups of sequences without padding and without repetition.

    Three levels are shared: a prefix of all sequences, whose keys and values are computed once and kept;
    within a group what its sequences begin with; and the rest of each. Exact: every token sees its own
    sequence and nothing else.

    Args:
        model: Of transformers, with full attention, in eval mode.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._prefix: Tokens = ()
        self._cache: KeyValues | None = None

    @staticmethod
    def can_read(model: torch.nn.Module, longest: int) -> bool:
        """Whether a model gives the same packed as plain, tried out once on a few tokens.

        Some architectures add to the attention what this one does not know of (sinks, soft caps, biases).

        Args:
            longest: Tokens of the longest sequence that will come: a sliding window must not be shorter.
        """
        config = model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if any(window and longest > window for window in windows):
            return False
        if model not in _tried:
            _tried[model] = PackedModel._agrees(model)
        return _tried[model]

    @staticmethod
    def _agrees(model: torch.nn.Module) -> bool:
        rows = [[*range(3, 20), *ends] for ends in ((5, 9, 4), (4, 8), (7,))]
        packed = PackedModel(model)
        try:
            packed.cache(rows[0][:6])
            found = packed.logits([rows[:2], rows[2:]], 1)[:, 0].float().log_softmax(-1)
        except Exception:  # whatever an architecture raises that takes no such attention
            return False
        device = found.device
        with torch.no_grad():
            plain = [model(input_ids=torch.tensor([row], device=device), use_cache=False) for row in rows]
        expected = torch.stack([out.logits[0, -1] for out in plain]).float().log_softmax(-1)
        # Below float32 rounding alone makes a difference; what a wrong mask makes is larger by far.
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
        return bool((found - expected).abs().max() < tolerance)

    @property
    def cached(self) -> int:
        """Tokens of the prefix."""
        return len(self._prefix)

    @torch.no_grad()
    def cache(self, prefix: Tokens) -> None:
        """Compute a prefix, which all sequences begin with from here on; it may be empty."""
        if list(prefix) == list(self._prefix):
            return
        self._prefix, self._cache = list(prefix), None
        if prefix:
            layout = _Layout([(0, len(prefix))], [self._causal(len(prefix))], keep=[])
            self._forward(list(prefix), list(range(len(prefix))), [len(prefix) - 1], layout)
            self._cache = layout.keep

    @torch.no_grad()
    def logits(self, groups: Sequence[Sequence[Tokens]], keep: int) -> torch.Tensor:
        """Logits at the last positions of every sequence.

        Args:
            groups: Groups of sequences that begin alike, each with the prefix and at least ``keep`` more tokens.
            keep: Positions wanted.

        Returns:
            (sequences, keep, vocabulary) in the model's dtype, group by group.
        """
        row = _Row()
        for group in groups:
            row.add(group, self.cached, keep)
        masks = [self._mask(segments) for segments in row.segments]
        logits = self._forward(row.ids, row.positions, row.wanted, _Layout(row.spans, masks, self._cache))
        return logits.view(-1, keep, logits.shape[-1])

    def _forward(self, ids: list[int], positions: list[int], wanted: list[int], layout: _Layout) -> torch.Tensor:
        device = self.model.device
        with _packed(self.model, layout):
            return self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                logits_to_keep=torch.tensor(wanted, device=device),
                use_cache=False,
            ).logits[0]

    def _causal(self, length: int) -> torch.Tensor:
        full = torch.full((length, length), float("-inf"), dtype=self.model.dtype, device=self.model.device)
        return full.triu(1)

    def _mask(self, segments: list[tuple[int, int]]) -> torch.Tensor:
        """The first segment is seen by all others, which do not see each other."""
        prefix, shared, length = self.cached, segments[0][1], segments[-1][1]
        mask = torch.full((length, length), float("-inf"), dtype=self.model.dtype, device=self.model.device)
        mask[:, :shared] = 0
        for start, end in segments:
            mask[start:end, start:end] = self._causal(end - start)
        return torch.cat((mask.new_zeros(length, prefix), mask), 1)
