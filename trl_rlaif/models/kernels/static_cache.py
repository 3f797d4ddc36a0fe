"""Keys and values in tensors of fixed size, with which transformers compiles decoding on a GPU (CUDA graphs)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trl_rlaif.models.kernels.switches import used
from trl_rlaif.models.sharding import is_shared_out
from trl_rlaif.models.shared_model import inner_model

# Lengths are rounded up to a multiple of this: each one is compiled anew.
STEP = 256


def static_cache(model: nn.Module, length: int) -> dict[str, Any]:
    """Arguments for a GenerationConfig; none where the kernel ``static_cache`` is off or the model takes no such cache.

    Ask where the model is about to generate, under its autocast. Transformers compiles nothing on a CPU, nor 4-bit
    weights.

    Args:
        length: Tokens of the longest prompt and its response.
    """
    inner = inner_model(model)
    if not used("static_cache", inner.device) or not getattr(inner, "_can_compile_fullgraph", False):
        return {}
    if is_shared_out(inner):  # what gathers the weights cannot be compiled
        return {}
    device = inner.device.type
    types = {p.dtype for name, p in inner.named_parameters() if "lora_" not in name}
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    if len(types) > 1:  # keys and values may differ in type, and such a cache has one for both
        return {}
    return {"cache_implementation": "static", "max_cache_len": -(-length // STEP) * STEP}
