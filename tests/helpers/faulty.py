"""Tiny models of families that transformers itself computes incorrectly with left padding or with a cache."""

from __future__ import annotations

import pytest
import torch
import transformers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# With left-padded prompts, RecurrentGemma is always wrong, and MiniMax only when sampling. Zamba2 is wrong with a
# cache, padded or not.
FAULTY = {
    "RecurrentGemma": {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32},
    "MiniMax": {
        "num_hidden_layers": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 16,
    },
    "Zamba2": {
        "num_hidden_layers": 2,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "num_key_value_heads": 4,
        "time_step_min": 0.1,  # ignored by its cached step
    },
}


def faulty(family: str):
    """A tiny model of a family, with weights large enough for its bug to show."""
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(**SIZES | FAULTY[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "A_log" not in name:
            parameter.data.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model
