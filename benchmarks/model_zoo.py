"""Tiny models with random weights of all commonly aligned families, for `model_table.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 48  # of sliding attention: shorter than the compared sequences
_ALTERNATING = ["sliding_attention", "full_attention"]

# The same sizes under the names of all families; a configuration keeps unknown ones as attributes.
_SIZES: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_SLIDING = {"sliding_window": WINDOW, "layer_types": _ALTERNATING}
_DELTA = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_ssm": 128,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
    "n_mamba_heads": 4, "mamba_headdim": 32, "mamba_ngroups": 1, "state_size": 16,
}  # fmt: skip
_PER_LAYER = {
    "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2, "sliding_window": WINDOW, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 16,
}  # fmt: skip

# By transformers' name of the architecture, with its specific options; "name: variant" if there are several.
# `...` leaves the value to the configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {}, "arcee": {}, "bamba": _MAMBA | {"attn_layer_indices": [1]}, "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {}, "cohere2": _SLIDING, "deepseek_v3": _EXPERTS | _LATENT, "doge": {}, "dots1": _EXPERTS,
    "ernie4_5": {}, "ernie4_5_moe": _EXPERTS,
    "exaone4": {"sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2},
    "falcon: rotary": {"head_dim": ..., "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon: alibi": {"head_dim": ..., "alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "falcon_h1": _MAMBA, "gemma": {}, "gemma2": _SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3n_text": _PER_LAYER | {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _PER_LAYER | {"global_head_dim": 16}, "glm": {}, "glm4": {}, "glm4_moe": _EXPERTS,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}, "gpt_neox": {},
    "gpt_oss": _EXPERTS | _SLIDING, "granite": {}, "granitemoe": _EXPERTS,
    "granitemoehybrid": _EXPERTS | _MAMBA | {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    "helium": {}, "hunyuan_v1_dense": {},
    "jamba": _EXPERTS | _MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _EXPERTS | _LATENT | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16,
                                         "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"]}, "llama": {},
    "llama4_text": _EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1,
                               "attention_chunk_size": 64, "no_rope_layers": [1, 0]},
    "mamba": {"state_size": 16}, "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "minimax": _EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 32},
    "minimax_m2": _EXPERTS, "ministral": _SLIDING, "ministral3": {}, "mistral: window": {"sliding_window": WINDOW},
    "mistral": {"sliding_window": None}, "mixtral": _EXPERTS,
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 2048}, "nemotron": {},
    "nemotron_h": _MAMBA | {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    "olmo2": {}, "olmo3": _SLIDING, "olmo_hybrid": _DELTA, "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}, "phi": {}, "phi3": {"sliding_window": None},
    "phi3: window": {"sliding_window": WINDOW}, "phimoe": _EXPERTS | {"router_jitter_noise": 0.0}, "qwen2": {},
    "qwen2: window": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {}, "qwen3_moe": _EXPERTS, "qwen3_next": _EXPERTS | _DELTA, "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _EXPERTS | _DELTA,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": WINDOW, "lru_width": 64},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]}, "stablelm": {}, "starcoder2": {"sliding_window": None},
    "starcoder2: window": {"sliding_window": WINDOW},
    "zamba2": _MAMBA | {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1,
                        "attention_head_dim": 32, "kv_channels": 16, "num_key_value_heads": 4},
}  # fmt: skip


def installed() -> Iterator[str]:
    """The families that the installed transformers knows."""
    return (name for name in FAMILIES if name.partition(":")[0] in CONFIG_MAPPING)


def save(name: str, folder: Path, vocab_size: int) -> None:
    """Write a family's float32 model with weights large enough to reveal a wrong mask or position."""
    options = {key: value for key, value in (_SIZES | FAMILIES[name]).items() if value is not ...}
    config = CONFIG_MAPPING[name.partition(":")[0]](vocab_size=vocab_size, **options)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "A_log" not in key:
            parameter.data.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        elif key.endswith(("bias", "sinks")) and "dt_bias" not in key:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
