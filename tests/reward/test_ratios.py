"""Log-probabilities of whole responses against a plain loop."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.tiny import make_gpt2, make_llama
from peft import LoraConfig

from trl_rlaif import SharedBase, UserError
from trl_rlaif.reward.log_ratios import add_log_ratios, response_logprobs

ROWS = {
    "chosen_ids": [[5, 9, 4, 7, 8, 2], [5, 3], [6, 7, 8, 11, 12, 13, 14, 2]],
    "rejected_ids": [[5, 9, 4, 6], [5, 3, 8, 8, 9, 10], [6, 7, 9]],
    "prompt_length": [3, 1, 2],
}


def _by_hand(model, ids, prompt) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(prompt, len(ids)))


@pytest.mark.parametrize("tokens", [10**6, 1])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_whole_responses(make, tokens):
    model = make()
    found = response_logprobs(model, ROWS["chosen_ids"], ROWS["prompt_length"], batch_tokens=tokens)
    expected = [_by_hand(model, *row) for row in zip(ROWS["chosen_ids"], ROWS["prompt_length"], strict=True)]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=2e-5)


def test_ratios_of_the_current_policy_to_others():
    shared = SharedBase(make_llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    other = make_llama(seed=3)
    data = add_log_ratios(
        Dataset.from_dict(ROWS),
        lambda: (shared.role("policy"), shared.model),
        [other, lambda: (shared.role(None), shared.model)],
    )
    for name in ("chosen", "rejected"):
        for i, ids in enumerate(ROWS[f"{name}_ids"]):
            with shared.role("policy"):
                own = _by_hand(shared.model, ids, ROWS["prompt_length"][i])
            with shared.role(None):
                base = _by_hand(shared.model, ids, ROWS["prompt_length"][i])
            expected = [own - _by_hand(other, ids, ROWS["prompt_length"][i]), own - base]
            assert data[f"{name}_log_ratios"][i] == pytest.approx(expected, abs=5e-5)
            assert abs(expected[1]) > 0.1


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match="no prompt_length"):
        add_log_ratios(Dataset.from_dict({k: v for k, v in ROWS.items() if "ids" in k}), make_llama(), [])
