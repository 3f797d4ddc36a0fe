"""Tiny random models and tokenizers that need no download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)

_TEXT = [
    "You are an impartial judge. Answer with 1 or 2 only. Preferred Response=1 Preferred Response=2",
    "the quick brown fox jumps over the lazy dog 0123456789",
    "Request: Response 1: Response 2: what is the capital of a country? It is a city.",
]


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most 400 tokens, with its own padding and end tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        padding_side="left",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(vocab_size: int, hidden_size: int, length: int = 512, **extra: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # wide, so that outputs differ visibly between prompts
        **extra,
    )


def make_llama(vocab_size: int = 400, *, seed: int = 0, hidden_size: int = 32, length: int = 512) -> LlamaForCausalLM:
    """A two-layer Llama with random float32 weights and a context of ``length`` tokens."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(vocab_size, hidden_size, length)).eval()


def make_scorer(vocab_size: int = 400, *, seed: int = 1, hidden_size: int = 32) -> LlamaForSequenceClassification:
    """The same architecture with a scalar head: a reward or value model."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config(vocab_size, hidden_size, num_labels=1)).eval()


def make_gpt2(vocab_size: int = 400, *, seed: int = 0) -> GPT2LMHeadModel:
    """A two-layer GPT-2 with random float32 weights."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=512)).eval()


def save_tiny_model(folder: object, *, seed: int = 0, hidden_size: int = 32, length: int = 512) -> str:
    """Write a model folder for a recipe's ``model.path``; returns the path.

    Args:
        folder: The folder to write to.
        length: Context length. The packaged judge prompts need 2,048 tokens of this tokenizer.
    """
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), seed=seed, hidden_size=hidden_size, length=length)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
