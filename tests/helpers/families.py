"""Tiny random models of families that differ in class, layers and attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.tiny import make_tokenizer

_TOKENS = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_USUAL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_TEXT = {
    "granite": _USUAL,
    "qwen3": _USUAL,
    "gemma2": _USUAL | {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "doge": _USUAL,
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": _MAMBA | {"n_groups": 1, "expand": 2, "chunk_size": 32},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
    | {"new_decoder_architecture": False, "multi_query": False},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "llama4_text": _USUAL
    | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1}
    | {"attention_chunk_size": 64, "no_rope_layers": [1, 0]},
    "gemma3_text": _USUAL | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_5_text": _USUAL | _LINEAR | {"num_hidden_layers": 4},
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 8}


def family_config(kind: str) -> PretrainedConfig:
    """The config of a text model by its transformers model type, or of the multimodal ``gemma3`` or ``qwen3_5``."""
    if kind in _TEXT:
        return CONFIG_MAPPING[kind](**_TOKENS | _TEXT[kind])
    vision: dict[str, Any] = {
        "gemma3": _VISION | {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16},
        "qwen3_5": _VISION | {"depth": 2, "num_heads": 4, "out_hidden_size": 64, "num_position_embeddings": 16},
    }
    images = {"gemma3": {"mm_tokens_per_image": 4, "boi_token_index": 390, "eoi_token_index": 391}}
    text = family_config(f"{kind}_text").to_dict()
    token = {"image_token_index": 392} if kind == "gemma3" else {"image_token_id": 392}
    return CONFIG_MAPPING[kind](text_config=text, vision_config=vision[kind], **token, **images.get(kind, {}))


def make_family(kind: str, *, auto: Any = AutoModelForCausalLM, scale: float = 0.25) -> PreTrainedModel:
    """A model with random float32 weights, large enough that outputs differ visibly between prompts."""
    torch.manual_seed(0)
    model = auto.from_config(family_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=scale)
    return model


def save_family(kind: str, folder: Any) -> str:
    """Save a checkpoint as found on the Hub, with a tokenizer; returns its path."""
    several = kind in ("gemma3", "qwen3_5")
    make_family(kind, auto=AutoModelForImageTextToText if several else AutoModelForCausalLM).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
