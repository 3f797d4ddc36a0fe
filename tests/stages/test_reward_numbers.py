"""What the stage reward says of held-out pairs, from scores that are given."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trl_rlaif.errors import RunError
from trl_rlaif.measures import wilson
from trl_rlaif.stages import reward

ROWS = {
    "p": [0.9, 0.8, 0.7, 0.5, 1.0],
    "category": ["a", "a", None, "b", "b"],
    "human": [True, False, True, None, False],
}
CHOSEN, REJECTED = [1.0, 2.0, -1.0, 0.0, 3.0], [0.0, 2.0, 0.0, 1.0, 4.0]  # right, tie, wrong, no label, wrong


@pytest.fixture
def numbers(monkeypatch, tmp_path):
    """Numbers of given scores."""

    def numbers(chosen, rejected):
        scores = (torch.tensor(chosen), torch.tensor(rejected), None)
        monkeypatch.setattr(reward, "score_pairs", lambda *arguments: scores)
        context = SimpleNamespace(recipe=SimpleNamespace(reward=SimpleNamespace(transforms=[])), folder=tmp_path)
        args = SimpleNamespace(per_device_eval_batch_size=2)
        trainer = SimpleNamespace(
            args=args, model=None, data_collator=None, batch_tokens=None, reward_transforms=[]
        )  # fmt: skip
        ids = {f"{side}_ids": [[5, 2]] * len(chosen) for side in ("chosen", "rejected")}
        return reward._held_out_numbers(context, trainer, Dataset.from_dict(ROWS | ids))

    return numbers


def test_equal_scores_count_half(numbers):
    found = numbers(CHOSEN, REJECTED)
    assert found["accuracy"] == 1.5 / 4 and found["accuracy_interval"] == wilson(1.5, 4)
    assert found["scores"]["accuracy"] == {"(none)": 0.0, "a": 0.75, "b": 0.0}
    people = found["agreement"]
    assert (people["rate"], people["n"], people["ties"]) == (2.5 / 4, 4, 1) and people["interval"] == wilson(2.5, 4)
    assert json.loads(json.dumps(found))["accuracy"] == 0.375


def test_without_labels_or_people_there_is_no_accuracy(numbers, monkeypatch):
    monkeypatch.setitem(ROWS, "p", [0.5] * 5)
    monkeypatch.setitem(ROWS, "human", [None] * 5)
    found = numbers(CHOSEN, REJECTED)
    assert found["accuracy"] is found["accuracy_interval"] is found["agreement"] is None
    assert found["scores"]["accuracy"] == {}


def test_a_diverged_model_is_an_error(numbers):
    with pytest.raises(RunError, match="diverged"):
        numbers([float("nan"), *CHOSEN[1:]], REJECTED)
