"""Configurations of the models in the packaged recipes, so that planning them needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_rlaif.models.loading import hub_id

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# From each repository's config.json.
_QWEN25: dict[str, Any] = {
    "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": dict(zip(_SIZES, (896, 4864, 24, 14, 2), strict=True)),
    "Qwen/Qwen2.5-1.5B-Instruct": dict(zip(_SIZES, (1536, 8960, 28, 12, 2), strict=True)),
    "Qwen/Qwen2.5-3B-Instruct": dict(zip(_SIZES, (2048, 11008, 36, 16, 2), strict=True)),
    "Qwen/Qwen2.5-7B-Instruct": dict(zip(_SIZES, (3584, 18944, 28, 28, 4), strict=True))
    | {"vocab_size": 152064, "tie_word_embeddings": False},
}


def known_config(path: str) -> PretrainedConfig | None:
    """The configuration of a model in a packaged recipe; None for any other, or if ``path`` is a folder."""
    sizes = _KNOWN.get(hub_id(path) or "")
    if sizes is None:
        return None
    from transformers import Qwen2Config

    return Qwen2Config(**_QWEN25 | sizes)
