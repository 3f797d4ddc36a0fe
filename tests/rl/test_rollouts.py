"""Sampling: the log-probabilities recorded during generation match a plain forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny import make_gpt2, make_llama
from transformers import MambaConfig, MambaForCausalLM

from trl_rlaif.models.forward import model_inputs, token_logprobs
from trl_rlaif.rl.rollouts import generate, join_rollouts, response_lengths
from trl_rlaif.testing import make_rollout

PAD, STOP = 0, 2


def _prompts():
    ids = torch.tensor([[PAD, PAD, 7, 8, 9], [4, 5, 6, 7, 8], [PAD, 3, 9, 9, 4]])
    return ids, ids != PAD


def _make_mamba():
    """A model without keys and values, and with another name for its cache."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3)
    return MambaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [make_llama, make_gpt2, _make_mamba])
@pytest.mark.parametrize("stop", [[STOP], []])
def test_logprobs_are_those_of_a_forward_pass(make, stop):
    model, (ids, mask) = make(), _prompts()
    # A checkpoint's own generation config must not affect the rollout.
    model.generation_config.update(top_k=3, repetition_penalty=2.0)
    torch.manual_seed(5)
    response, logprobs = generate(model, ids, mask, max_new_tokens=24, temperature=0.7, pad_id=PAD, stop_id=stop)
    lengths, _ = response_lengths(response, stop_ids=stop, pad_id=PAD)
    inputs = model_inputs(ids, mask, response, lengths)
    width = response.shape[1]
    with torch.no_grad():
        logits = model(**inputs).logits[:, -width - 1 : -1]
    expected = token_logprobs(logits, response, 0.7)
    real = torch.arange(width) < lengths[:, None]
    torch.testing.assert_close(logprobs[real], expected[real], rtol=1e-4, atol=1e-4)
    assert model.generation_config.top_k == 3


def test_where_responses_end():
    response = torch.tensor([[5, 6, 7], [5, STOP, PAD], [STOP, 5, 5], [5, PAD, STOP], [5, 6, STOP]])
    lengths, ended = response_lengths(response, stop_ids=[STOP], pad_id=PAD)
    assert lengths.tolist() == [3, 2, 1, 1, 3]
    assert ended.tolist() == [False, True, True, False, True]


def test_an_end_token_that_is_also_padding_belongs_to_the_response():
    lengths, ended = response_lengths(torch.tensor([[5, 2, 2], [5, 6, 7]]), stop_ids=[2], pad_id=2)
    assert lengths.tolist() == [2, 3]
    assert ended.tolist() == [True, False]


def test_joined_rollouts_are_the_rows_of_each():
    rollouts = [make_rollout(count, seed=count) for count in (3, 5)]
    narrow = replace(
        rollouts[1],
        **{name: getattr(rollouts[1], name)[:, 2:] for name in ("prompt_ids", "prompt_mask")},
        **{name: getattr(rollouts[1], name)[:, :-3] for name in ("response_ids", "logprobs", "ref_logprobs", "values")},
        lengths=rollouts[1].lengths.clamp(max=4),
    )
    joined = join_rollouts([rollouts[0], narrow])
    for rows, rollout in ((slice(0, 3), rollouts[0]), (slice(3, 8), narrow)):
        assert joined.prompts[rows] == rollout.prompts and joined.categories[rows] == rollout.categories
        assert torch.equal(joined.lengths[rows], rollout.lengths)
        mask, wide = rollout.masks()[0], joined.masks()[0][rows]
        for name in ("response_ids", "logprobs", "ref_logprobs"):
            assert torch.equal(getattr(joined, name)[rows][wide], getattr(rollout, name)[mask])
        assert torch.equal(joined.prompt_ids[rows][joined.prompt_mask[rows]], rollout.prompt_ids[rollout.prompt_mask])


def test_inputs_leave_out_padding_that_all_rows_share():
    ids, mask = _prompts()
    rows = torch.tensor([0, 2])
    inputs = model_inputs(ids[rows], mask[rows], torch.tensor([[5, 6], [5, 6]]), torch.tensor([1, 2]))
    assert inputs["input_ids"].tolist() == [[0, 7, 8, 9, 5, 0], [3, 9, 9, 4, 5, 6]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert inputs["position_ids"][0, 1:5].tolist() == [0, 1, 2, 3]
