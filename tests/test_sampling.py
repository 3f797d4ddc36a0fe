"""Sampling responses follows the arguments alone."""

from __future__ import annotations

import pytest
import torch
from helpers.faulty import faulty
from helpers.tiny import make_llama, make_tokenizer

from trl_rlaif.generation import padded_together, sample_responses


def test_a_checkpoints_own_sampling_settings_stay_out():
    """Qwen2.5's, for example, include a repetition penalty, and generate() merges them into its arguments."""
    tokenizer = make_tokenizer()
    model, prompts = make_llama(len(tokenizer)), [tokenizer(f"what is {i}?")["input_ids"] for i in range(4)]

    def drawn(temperature):
        torch.manual_seed(0)
        return sample_responses(model, tokenizer, prompts, max_new_tokens=12, temperature=temperature)

    before = [drawn(0), drawn(1.0)]
    settings = model.generation_config
    settings.repetition_penalty, settings.top_k, settings.do_sample = 5.0, 1, True
    assert [drawn(0), drawn(1.0)] == before
    assert model.generation_config is settings


@pytest.mark.parametrize("family", ["RecurrentGemma", "MiniMax"])
def test_models_that_left_padding_changes_are_sampled_without(family):
    tokenizer, model = make_tokenizer(), faulty(family)
    prompts = [tokenizer(text)["input_ids"] for text in ("what is it?", "the quick brown fox jumps over", "no", "go")]
    sampling = {"max_new_tokens": 8, "temperature": 0, "stop_ids": ()}
    alone = [sample_responses(model, tokenizer, [prompt], **sampling)[0] for prompt in prompts]
    assert sample_responses(model, tokenizer, prompts, **sampling) == alone
    lengths = [len(prompt) for prompt in prompts]
    groups = padded_together(model, lengths)
    assert len(groups) == len(set(lengths)) > 1 and sorted(sum(groups, [])) == [0, 1, 2, 3]
    assert padded_together(make_llama(), lengths) == [[0, 1, 2, 3]]


def test_an_end_token_that_is_also_padding_is_kept():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model, end = make_llama(len(tokenizer)), tokenizer.eos_token_id
    model.lm_head.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, torch.tensor([end]), 100.0))
    sampling = {"max_new_tokens": 3, "temperature": 0}
    assert sample_responses(model, tokenizer, [[5]], keep_end=True, **sampling) == [[[end]]]
    assert sample_responses(model, tokenizer, [[5]], **sampling) == [[[]]]


@pytest.mark.parametrize(("in_float64", "together"), [(1e-9, [[0, 1]]), (2e-3, [[0], [1]])])
def test_what_is_rounding_is_found_out_in_float64(monkeypatch, in_float64, together):
    changes = {torch.float32: 2e-3, torch.float64: in_float64}
    monkeypatch.setattr("trl_rlaif.generation._padding_changes", lambda model, dtype: changes[dtype])
    assert padded_together(make_llama(), [3, 5]) == together
