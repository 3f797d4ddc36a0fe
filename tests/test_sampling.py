"""Sampling responses: what the arguments say is what is drawn."""

from __future__ import annotations

import torch
from helpers.tiny import make_llama, make_tokenizer

from trl_rlaif.sampling import sample_responses


def test_a_checkpoints_own_sampling_settings_stay_out():
    """Qwen2.5's, for one, hold a repetition penalty, and generate() merges them into what it is given."""
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
