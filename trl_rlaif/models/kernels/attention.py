"""Attention for training on a CPU: bfloat16's, where torch's own kernel has a slow backward pass, and by rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_rlaif.models.kernels.switches import used
from trl_rlaif.models.kernels.trials import trial
from trl_rlaif.models.shared_model import backbone

NAME = "trl_rlaif_cpu"

# benchmarks/attention.py on 2 cores, torch 2.13, forward and backward in ms:
#   tokens             96   160   224   320
#   torch, bfloat16    14    26    27    44
#   torch, float32      5    14    25    44
#   whole_attention     4    15    40    80   (and its probabilities take memory by the square)
WHOLE_UP_TO = 128
FLOAT32_UP_TO = 256

# What models hand to their attention that changes nothing here.
_HARMLESS = {"dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}


def refuse_unknown(options: dict[str, Any]) -> None:
    """Raise NotImplementedError where a model asks its attention for more than it does here, such as a soft cap.

    On the few tokens of a trial it may make a difference too small to be seen.
    """
    unknown = {name for name, value in options.items() if value is not None and value is not False} - _HARMLESS
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(sorted(unknown))}")


def refuse_own_mask(mask: torch.Tensor | None) -> None:
    """Raise NotImplementedError where a model made a mask, which is not read here.

    Doge adds to its mask what it learns of every key: zero at first, so that no trial would show it.
    """
    if mask is not None and mask.numel() > 1:
        raise NotImplementedError("attention with a mask of the model's own")


def sliding_windows(config: Any) -> list[int | None]:
    """The window of every layer that a configuration speaks of; None for a layer that sees all."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * getattr(config, "num_hidden_layers", 0)
    return [window if kind == "sliding_attention" else None for kind in kinds]


@dataclass
class PairRows:
    """Pairs one behind the other in a single sequence: what a pair's two sequences share, and the rest of each.

    Given to a model as the argument ``packed_rows``, inside ``trainable_attention``; ``attention_mask`` is not read.

    Args:
        lengths: (shared, chosen, rejected) tokens of each pair.
        windows: Filled with the sliding window of every layer.
        masks: Those made so far, by (queries, keys, window).
    """

    lengths: list[tuple[int, int, int]]
    windows: list[int | None] = field(default_factory=list)
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, window: int | None) -> torch.Tensor | None:
        """(queries, keys) bool: the last tokens of a sequence, and what they see of it; None for all of a triangle."""
        if queries == keys and (window is None or window >= keys):
            return None
        kind = queries, keys, min(window or keys, keys)
        if kind not in self.masks:
            every, own = torch.ones(queries, keys, dtype=torch.bool), keys - queries
            self.masks[kind] = every.tril(own) & every.triu(own - kind[2] + 1)
        return self.masks[kind]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: PairRows | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    _calls.set(_calls.get() + 1)
    if packed_rows is not None:
        window = kwargs.pop("sliding_window", None)
        refuse_unknown(kwargs)
        refuse_own_mask(attention_mask)
        packed_rows.windows.append(window)
        return _by_rows(query, key, value, packed_rows, window, dropout, scaling), None
    length = query.shape[2]
    usual = dropout == 0 and length == key.shape[2] and kwargs.get("position_bias") is None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    usual = usual and (causal or attention_mask is not None)  # without a mask, an encoder's tokens see all others
    if not (usual and _is_slow(query) and length <= FLOAT32_UP_TO):
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return fastest_attention(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None


def _by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: PairRows,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attention within each pair; no more is computed than is seen. (1, S, H, D)."""
    # Split once: the backward pass of a slice would fill a tensor of the whole row's size for each pair.
    queries = query.split([n for shared, chosen, rejected in rows.lengths for n in (shared + chosen, rejected)], 2)
    keys, values = (x.split([n for lengths in rows.lengths for n in lengths], 2) for x in (key, value))
    found = []
    for i, lengths in enumerate(rows.lengths):
        for own, q in enumerate(queries[2 * i : 2 * i + 2], 1):
            if q.shape[2]:
                k, v = (torch.cat((x[3 * i], x[3 * i + own]), 2) for x in (keys, values))
                mask = rows.mask(q.shape[2], lengths[0] + lengths[own], window)
                found.append(fastest_attention(q, k, v, mask, dropout, scaling))
    return torch.cat([part.transpose(1, 2) for part in found], 1)


def _low(query: torch.Tensor) -> torch.dtype:
    """The precision to compute in. Rotary embeddings leave queries and keys in float32, also under autocast."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def _is_slow(query: torch.Tensor) -> bool:
    """Whether torch would compute in bfloat16, and is not left to do so."""
    return _low(query) == torch.bfloat16 and used("cpu_attention", "cpu")


def fastest_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attention by the way that is the fastest to train for its length.

    Args:
        query: (B, H, Q, D).
        key, value: (B, K, S, D); H is a multiple of K.
        mask: (Q, S) or (B, 1, Q, S), bool or added to the scores; None is that of a causal model.
        dropout: Of the probabilities.
        scaling: Of the scores; None is 1 / sqrt(D).

    Returns:
        (B, H, Q, D), in what autocast computes, or else in the query's dtype.
    """
    low, seen = _low(query), key.shape[2]
    scaling = scaling or query.shape[3] ** -0.5
    slow = _is_slow(query)
    with torch.autocast("cpu", enabled=False):
        if slow and seen <= WHOLE_UP_TO and not dropout and key.shape[3] == value.shape[3]:
            q, k, v = (x.to(low) for x in (query, key, value))
            return whole_attention(q, k, v, _bias(mask, seen), scaling)
        short = slow and seen <= FLOAT32_UP_TO
        q, k, v = (x.float() if short else x.to(low) for x in (query, key, value))
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
        ).to(low)


def _bias(mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """What is added to the scores: 0, or float32's least where a token may not look; (1 or B, 1, S, S)."""
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


def whole_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax attention by four matrix products, keeping the probabilities for the backward pass.

    Args:
        query: (B, H, Q, D), of any float dtype. Scores and softmax are float32, other products its dtype.
        key, value: (B, K, S, D); H is a multiple of K, and query heads share keys in runs of H / K.
        bias: (Q, S) or (1 or B, 1, Q, S) float32, added to the scaled scores.

    Returns:
        (B, H, Q, D).
    """
    return _WholeAttention.apply(query, key, value, bias, scaling)


class _WholeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        (batch, heads, length, width), (_, kv_heads, seen, _) = query.shape, key.shape
        # The query heads that share a head of keys become rows of one matrix: nothing is repeated.
        q = query.reshape(batch * kv_heads, -1, width)
        k, v = (x.reshape(batch * kv_heads, seen, width) for x in (key, value))
        scores = torch.bmm(q.float(), k.float().transpose(1, 2)).view(batch, heads, length, seen)
        probabilities = scores.mul_(scaling).add_(bias).softmax(-1).to(query.dtype).view(batch * kv_heads, -1, seen)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return torch.bmm(probabilities, v).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        queries, keys = ctx.shapes
        g = gradient.reshape(q.shape)
        by_value = torch.bmm(p.transpose(1, 2), g)
        by_p, p32 = torch.bmm(g, v.transpose(1, 2)).float(), p.float()
        # The softmax's own backward pass (dS = P (dP - sum P dP)).
        by_score = by_p.sub_((by_p * p32).sum(-1, keepdim=True)).mul_(p32).mul_(ctx.scaling).to(p.dtype)
        by_query = torch.bmm(by_score, k).view(queries)
        by_key = torch.bmm(by_score.transpose(1, 2), q).view(keys)
        return by_query, by_key, by_value.view(keys), None, None


# What a trial of each model said; and how often this attention was called.
_interface: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_calls: ContextVar[int] = ContextVar("_calls", default=0)
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def trainable_attention(*models: nn.Module) -> Iterator[None]:
    """Inside, on CPUs, attention in bfloat16 takes the way whose backward pass is the fastest for its length.

    Models whose attention does not go through transformers' interface are left alone.
    """
    changed = [model.config.get_text_config() for model in models if _takes_interface(model)]
    with _implementation(NAME, *changed):
        yield


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention as the model was loaded with, inside ``trainable_attention``: for what is not trained."""
    config = model.config.get_text_config()
    with _implementation("sdpa", *([config] if config._attn_implementation == NAME else [])):
        yield


def takes_masks(model: nn.Module) -> bool:
    """Whether a model's attention takes boolean masks of (batch, 1, queries, keys)."""
    return model.config.get_text_config()._attn_implementation in ("sdpa", NAME)


@contextmanager
def _implementation(name: str, *configs: Any) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in reversed(list(zip(configs, before, strict=True))):
            config._attn_implementation = own


def _takes_interface(model: nn.Module) -> bool:
    """Whether attention on a CPU goes through transformers' interface, with the same results; tried out once.

    Some models compare the name of their attention with those that they know, and compute something else for others.
    """
    config = model.config.get_text_config()
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        return False
    if model not in _interface:
        ids, before = torch.arange(3, 12)[None], _calls.get()
        mask = torch.ones_like(ids).index_fill_(1, torch.tensor([8]), 0)
        inputs = {"input_ids": ids.expand(2, -1), "attention_mask": torch.cat((mask, mask | 1)), "use_cache": False}
        with trial(model):
            try:
                expected = backbone(model)(**inputs).last_hidden_state
                with _implementation(NAME, config):
                    found = backbone(model)(**inputs).last_hidden_state
                same = torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
            except Exception:  # whatever an architecture raises at a name that it does not know
                same = False
        _interface[model] = same and _calls.get() > before
    return _interface[model]
