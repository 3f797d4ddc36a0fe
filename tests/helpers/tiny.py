"""Tiny random models and tokenizers from the public test kit."""

from trl_rlaif.testing.models import (
    CHAT_TEMPLATE,
    make_gpt2,
    make_llama,
    make_scorer,
    make_tokenizer,
    save_tiny_model,
)

__all__ = ["CHAT_TEMPLATE", "make_gpt2", "make_llama", "make_scorer", "make_tokenizer", "save_tiny_model"]
