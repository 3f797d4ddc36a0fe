"""Attention for training in bfloat16 on a CPU, where torch's own kernel has a slow backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "trl_rlaif_cpu"

# benchmarks/attention.py on 2 cores, torch 2.13, forward and backward in ms:
#   tokens             96   160   224   320
#   torch, bfloat16    14    26    27    44
#   torch, float32      5    14    25    44
#   whole_attention     4    15    40    80   (and its probabilities take memory by the square)
WHOLE_UP_TO = 128
FLOAT32_UP_TO = 256


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    length = query.shape[2]
    usual = dropout == 0 and length == key.shape[2] and kwargs.get("position_bias") is None
    # Rotary embeddings leave queries and keys in float32; torch's kernel would round them here, under autocast.
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if not (usual and low == torch.bfloat16 and length <= FLOAT32_UP_TO):
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = scaling or query.shape[3] ** -0.5
    with torch.autocast("cpu", enabled=False):
        if length <= WHOLE_UP_TO:
            q, k, v = (x.to(low) for x in (query, key, value))
            output = whole_attention(q, k, v, _bias(attention_mask, length), scaling)
        else:
            output = scaled_dot_product_attention(
                query.float(),
                key.float(),
                value.float(),
                attn_mask=attention_mask,
                is_causal=attention_mask is None,
                scale=scaling,
                enable_gqa=True,
            ).to(low)
    return output.transpose(1, 2).contiguous(), None


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
        query: (B, H, S, D), of any float dtype. Scores and softmax are float32, other products its dtype.
        key, value: (B, K, S, D); H is a multiple of K, and query heads share keys in runs of H / K.
        bias: (1 or B, 1, S, S) float32, added to the scaled scores.

    Returns:
        (B, H, S, D).
    """
    return _WholeAttention.apply(query, key, value, bias, scaling)


class _WholeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        (batch, heads, length, width), kv_heads = query.shape, key.shape[1]
        # The query heads that share a head of keys become rows of one matrix: nothing is repeated.
        q = query.reshape(batch * kv_heads, -1, width)
        k, v = (x.reshape(batch * kv_heads, length, width) for x in (key, value))
        scores = torch.bmm(q.float(), k.float().transpose(1, 2)).view(batch, heads, length, length)
        probabilities = scores.mul_(scaling).add_(bias).softmax(-1).to(query.dtype).view(batch * kv_heads, -1, length)
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


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def trainable_attention(*models: nn.Module) -> Iterator[None]:
    """Inside, on CPUs, attention in bfloat16 takes the way whose backward pass is the fastest for its length."""
    configs = {id(model.config): model.config for model in models if model.device.type == "cpu"}
    changed = [config for config in configs.values() if config._attn_implementation == "sdpa"]
    try:
        for config in changed:
            config._attn_implementation = NAME
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"
