"""Tokenizers and models for tests of real judges; prompts and the scripted judge come from the test kit."""

from __future__ import annotations

import copy
import math
import os
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers.tiny import CHAT_TEMPLATE, make_tokenizer
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.question import Question
from trl_rlaif.testing.judges import PARTS, ScriptedJudge, shown
from trl_rlaif.testing.judges import make_judge_prompt as make_prompt

__all__ = [
    "MODELS", "PARTS", "TOKENIZERS", "ScriptedJudge", "chunked", "gpt2", "in_double", "joined_digits", "llama",
    "make_prompt", "mistral", "path_probability", "plain_answer", "plain_text", "sentence_pieces", "shown",
]  # fmt: skip

# ---- Tokenizers -----------------------------------------------------------------------------------------

_TEXT = [
    "You are a judge. Take your time, and answer with 1 or 2 only, or with a number from 1 to 10.",
    "Request: Response 1: Response 2: Preferred Response= Rating= It is Response 1 It is Response 2",
    "It is 1 It is 10 It is 10 Rating=10 Rating=10 10 10 10 10 10 It is 2 It is 2 It is 9 =10 =10 is 10",
    "the quick brown fox jumps over the lazy dog and the capital of a country is a city, is it not?",
] * 3


_BYTES = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
_PIECES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@lru_cache
def _trained_bytes() -> str:
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_BYTES.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    return backend.to_str()


@lru_cache
def _trained_pieces(unigram: bool) -> str:
    alphabet = [*string.printable, "▁"]
    shared = {"special_tokens": list(_PIECES.values()), "initial_alphabet": alphabet, "show_progress": False}
    if unigram:
        backend = Tokenizer(tokenizer_models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=260, unk_token="<unk>", **shared)
    else:
        backend = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=260, **shared)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(_TEXT, trainer)
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return backend.to_str()


def _wrapped(backend: str, chat: bool, tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    made = Tokenizer.from_str(backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **tokens)
    if chat:
        start, end = tokens["bos_token"], tokens["eos_token"]
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<|start|>", start).replace("<|end|>", end)
    return tokenizer


def joined_digits(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps digits together: "10" is one token, and so is " 1"."""
    return _wrapped(_trained_bytes(), chat, _BYTES)


def sentence_pieces(*, chat: bool = True, unigram: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece style: a space starts the next piece, so "▁1" is one token; plain text starts with <s>."""
    return _wrapped(_trained_pieces(unigram), chat, _PIECES)


TOKENIZERS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "split digits": make_tokenizer,
    "joined digits": joined_digits,
    "unigram": sentence_pieces,
    "metaspace BPE": lambda **options: sentence_pieces(unigram=False, **options),
}


# ---- Models ---------------------------------------------------------------------------------------------

_SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # large, so that answers differ visibly between questions
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_SHAPE, "num_key_value_heads": 2}


def llama(*, length: int = 2048) -> torch.nn.Module:
    """With grouped-query attention."""
    return _made(LlamaForCausalLM, LlamaConfig(max_position_embeddings=length, **_GQA))


def gpt2(*, length: int = 2048) -> torch.nn.Module:
    """With absolute position embeddings."""
    shape = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return _made(GPT2LMHeadModel, GPT2Config(n_positions=length, initializer_range=0.3, **shape))


def mistral(*, window: int | None, length: int = 2048) -> torch.nn.Module:
    """With a sliding window."""
    config = MistralConfig(sliding_window=window, max_position_embeddings=length, **_GQA)
    return _made(MistralForCausalLM, config)


def chunked(*, chunk: int = 32, length: int = 2048) -> torch.nn.Module:
    """Its config claims chunked attention, which packing does not support, so its inputs are padded."""
    model = llama(length=length)
    model.config.attention_chunk_size = chunk
    return model


def _made(kind: type, config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(config).eval()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama,
    "qwen2": lambda: _made(Qwen2ForCausalLM, Qwen2Config(max_position_embeddings=2048, **_GQA)),
    "gpt-neox": lambda: _made(GPTNeoXForCausalLM, GPTNeoXConfig(max_position_embeddings=2048, **_SHAPE)),
    "gpt2": gpt2,
    "wide window": lambda: mistral(window=2048),
    "narrow window": lambda: mistral(window=32),
    "mixed windows": lambda: _made(
        Gemma3ForCausalLM,
        Gemma3TextConfig(sliding_window=16, layer_types=["sliding_attention", "full_attention"], head_dim=16, **_GQA),
    ),
    "padded": chunked,
}


# ---- References for real judges -------------------------------------------------------------------------


def plain_text(judge: LocalJudge, question: Question, opening: str) -> str:
    """A question and the opening of its answer, with the chat template or as plain text."""
    if not judge.tokenizer.chat_template:
        return "".join(f"{message['content']}\n\n" for message in question.messages) + opening
    messages = list(question.messages)
    return judge.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + opening


@torch.no_grad()
def path_probability(model: torch.nn.Module, context: Sequence[int], path: Sequence[int]) -> float:
    """Probability of tokens after a context: one forward pass over one sequence, in float64 from the logits on."""
    ids = torch.tensor([[*context, *path]], device=next(model.parameters()).device)
    logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return math.exp(sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(path)))


def plain_answer(
    judge: LocalJudge, question: Question, candidates: Sequence[str], opening: str | None = None
) -> list[float]:
    """Log-probabilities of the candidates by definition, with one forward pass per tokenization of each.

    A candidate is tokenized at the end of the whole text. If it is a prefix of another ("1" of "10"), the probability
    of the other is subtracted; the other may also be tokenized in two parts.
    """
    text = plain_text(judge, question, question.ending if opening is None else opening)
    special = {} if not judge.tokenizer.chat_template else {"add_special_tokens": False}

    def encode(text: str) -> list[int]:
        return judge.tokenizer(text, **special)["input_ids"]

    whole = {candidate: encode(text + candidate) for candidate in candidates}
    context = os.path.commonprefix([encode(text), *whole.values()])
    paths = {candidate: {tuple(ids[len(context) :])} for candidate, ids in whole.items()}
    for short in candidates:
        for long in candidates:
            if long != short and long.startswith(short):
                (spelled,) = paths[short]
                rest = judge.tokenizer.get_vocab()[long[len(short) :]]
                paths[long].add((*spelled, rest))
    p = {c: {path: path_probability(judge.model, context, path) for path in of} for c, of in paths.items()}
    result = []
    for candidate in candidates:
        own = paths[candidate]
        beyond = {
            path: value
            for other, of in p.items()
            for path, value in of.items()
            if other != candidate and any(path[: len(mine)] == mine for mine in own)
        }
        result.append(math.log(math.fsum(p[candidate].values()) - math.fsum(beyond.values())))
    return result


def in_double(judge: LocalJudge) -> LocalJudge:
    """The same judge with float64 weights, as a reference."""
    other = copy.copy(judge)
    other.model = copy.deepcopy(judge.model).double()
    return other
