"""Generation: prompts with several responses are read once."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make_family
from helpers.tiny import make_gpt2, make_llama, make_tokenizer

from trl_rlaif import generation
from trl_rlaif.generation import random_state, sample_responses, seeded, set_random_state

PROMPTS = [[5, 9, 4, 7, 8, 6, 3], [11, 12, 13], [21, 22, 23, 24, 25]]
FAMILIES = ("granite", "doge", "falcon", "mpt", "llama4_text", "gemma3_text", "qwen3_5_text", "mamba", "mamba2")


def _drawn(model, prompts=PROMPTS):
    with seeded(1, "draw"):
        limits = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": [2], "keep_end": True}
        return sample_responses(model, make_tokenizer(), prompts, num_responses=3, **limits)


@pytest.mark.parametrize("make", [make_llama, make_gpt2, *FAMILIES])
def test_reading_a_prompt_once_changes_no_response(monkeypatch, make):
    model = make_family(make) if isinstance(make, str) else make()
    read = []
    own = generation._read_prompts
    monkeypatch.setattr(generation, "_read_prompts", lambda *args: read.append(own(*args)) or read[-1])
    found = _drawn(model)
    monkeypatch.setattr(generation, "_read_prompts", lambda *args: None)
    assert found == _drawn(model)
    once = make not in ("mamba", "mamba2", "qwen3_5_text")  # their states are not rows of keys and values
    assert [cache is not None for cache in read] == [once] * len(read) and read


def test_a_prompt_is_computed_once_for_all_its_responses():
    model, computed = make_llama(), []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: computed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    _drawn(model, [PROMPTS[0], PROMPTS[0]])
    assert computed[0] == (2, 6) and set(computed[1:]) == {(6, 1)}


def test_the_random_state_is_that_of_this_processs_own_gpu(monkeypatch):
    """With two visible GPUs; and a run can resume without any."""
    states, own = {0: torch.tensor([0]), 1: torch.tensor([1])}, 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[own].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: states.update({own: state}))
    before = random_state()
    states[own] = torch.tensor([7])
    set_random_state(before)
    assert [state.item() for state in states.values()] == [0, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_random_state(before)
    assert random_state()[1] == []


def test_a_prompt_of_a_single_token():
    assert [len(rows) for rows in _drawn(make_llama(), [[5], [11, 12, 13]])] == [3, 3]
