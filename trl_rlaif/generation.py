"""Samples responses of a policy, in batches that can each be reproduced separately."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl_rlaif.batching import equal_lengths, pad_rows
from trl_rlaif.models.kernels import generation_kernels, static_cache, trial
from trl_rlaif.models.shared_model import inner_model
from trl_rlaif.stopping import stop_ids as all_stop_ids

# Cache layers whose rows can be repeated.
_REPEATED = (DynamicLayer, DynamicSlidingWindowLayer)


def derived_seed(*parts: object) -> int:
    """A seed in 0..2**31-1 that depends only on its parts and is the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Inside, seed torch's generators with the parts; restore their states afterwards."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(derived_seed(*parts))
        yield


def random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The state of torch's generators: that of the CPU, and of this process's GPU, if it has one.

    Other visible GPUs are not included: a run may be resumed with fewer.
    """
    return torch.get_rng_state(), [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []


def set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Restore a state returned by ``random_state``."""
    torch.set_rng_state(state[0])
    if state[1] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1][0])


@contextmanager
def bare_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """Ignore a checkpoint's own sampling settings (top-k, repetition penalty).

    generate() merges them into the config it is given, so the sampled distribution would not be the one whose
    log-probabilities PPO uses.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@torch.no_grad()
def sample_responses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    num_responses: int = 1,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    keep_end: bool = False,
    bf16: bool | None = None,
) -> list[list[list[int]]]:
    """Sample responses to encoded prompts in one batch.

    Args:
        model: Causal language model in the desired role.
        tokenizer: With a padding token.
        prompts: N token lists.
        num_responses: K, number of responses per prompt.
        max_new_tokens: Maximum response length.
        temperature: Sampling temperature; 0: greedy decoding.
        top_p: Nucleus sampling, in (0, 1].
        stop_ids: Tokens that end a response; None: those of tokenizer and model.
        keep_end: Keep the token that ended a response.
        bf16: Use bfloat16 autocast; None: decided by the model (``generation_kernels``).

    Returns:
        N lists of K token lists.
    """
    pad, stops = tokenizer.pad_token_id, all_stop_ids(tokenizer, model) if stop_ids is None else stop_ids
    drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_responses,
        pad_token_id=pad,
        eos_token_id=list(stops),
        **(drawing if temperature > 0 else {"do_sample": False}),
    )
    responses: list[list[list[int]]] = [[]] * len(prompts)
    for group in padded_together(model, [len(prompt) for prompt in prompts]):
        rows = iter(_generated(model, [prompts[i] for i in group], config, bf16))
        for i in group:
            responses[i] = [_until(next(rows), stops, pad, keep_end) for _ in range(num_responses)]
    return responses


def _generated(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], config: GenerationConfig, bf16: bool | None
) -> list[list[int]]:
    """The tokens after each prompt of a batch, ``num_return_sequences`` rows for each."""
    ids, mask = (x.to(next(model.parameters()).device) for x in pad_rows(prompts, config.pad_token_id, left=True))
    mask, drawn, kwargs = mask.long(), config.num_return_sequences, {}
    with bare_generation_config(model), generation_kernels(model, bf16):
        static = static_cache(model, ids.shape[1] + config.max_new_tokens)
        config.update(**static)
        cache = _read_prompts(model, ids, mask) if drawn > 1 and not static else None
        if cache is not None:
            cache.batch_repeat_interleave(drawn)
            ids, mask = (x.repeat_interleave(drawn, 0) for x in (ids, mask))
            kwargs, config.num_return_sequences = {"past_key_values": cache}, 1
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **kwargs)
    config.num_return_sequences = drawn
    return sequences[:, ids.shape[1] :].tolist()


def _read_prompts(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
    """Prefill a cache with all but the last token of each prompt: with several responses, prompts are computed once.

    None if the model caches something else, or a prompt is a single token.
    """
    inner = inner_model(model)
    if not getattr(type(inner), "_supports_default_dynamic_cache", lambda: False)() or not mask[:, :-1].any(1).all():
        return None
    if hasattr(getattr(inner, "model", None), "rope_deltas"):  # such models store positions for each row
        return None
    cache = DynamicCache(config=model.config.get_text_config())
    if not cache.layers or not all(type(layer) in _REPEATED for layer in cache.layers):
        return None
    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, generation_config=config)
    return cache


def _until(tokens: list[int], stops: Sequence[int], pad: int, keep_end: bool) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops or token == pad), len(tokens))
    return tokens[: end + 1] if keep_end and end < len(tokens) and tokens[end] in stops else tokens[:end]


_padding_works: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def padded_together(model: torch.nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Group indices of prompts into batches that the model can compute with left padding.

    This is a single batch, except for models that transformers computes incorrectly with padding (RecurrentGemma,
    MiniMax): their batches have prompts of equal length. Tested once per model.
    """
    inner = inner_model(model)
    if len(set(lengths)) <= 1:
        return [list(range(len(lengths)))]
    if inner not in _padding_works:
        _padding_works[inner] = _left_padding_works(inner)
    if _padding_works[inner]:
        return [list(range(len(lengths)))]
    return equal_lengths(lengths)


def _left_padding_works(model: torch.nn.Module) -> bool:
    """Whether left padding leaves the log-probabilities of a few generated tokens unchanged.

    In float32, those of SmolLM2-135M differ by 1.5e-3 on some processors, through rounding alone. If they differ, the
    test is repeated in float64.
    """
    return any(_padding_changes(model, dtype) < 1e-3 for dtype in (torch.float32, torch.float64))


def _padding_changes(model: torch.nn.Module, dtype: torch.dtype) -> float:
    """The largest difference between log-probabilities with and without padding, in nats."""
    prompt, padding = [5, 9, 4, 7, 8, 6, 3], [0] * 5
    config = GenerationConfig(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    config.pad_token_id = 0
    found = []
    with trial(model, dtype), bare_generation_config(model):
        for ids, mask in ((prompt, [1] * 7), (padding + prompt, padding + [1] * 7)):
            inputs = {"input_ids": ids, "attention_mask": mask}
            inputs = {name: torch.tensor([row], device=model.device) for name, row in inputs.items()}
            try:
                logits = model.generate(**inputs, generation_config=config).logits
            except RuntimeError:  # Mamba in bfloat16, which reads weights that a trial cannot upcast
                return 0.0 if dtype == torch.float32 else math.inf
            found.append(torch.cat(logits).double().log_softmax(-1))
    return (found[0] - found[1]).abs().max().item()
