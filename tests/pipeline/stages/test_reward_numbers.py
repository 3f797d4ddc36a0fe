"""The reward stage's numbers on held-out pairs, from given scores."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.recipes import tiny_recipe
from scipy.integrate import quad
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve

from trl_rlaif.errors import RunError
from trl_rlaif.evaluation import share_interval
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import reward
from trl_rlaif.plugins import installed_plugins

ROWS = {
    "p": [0.9, 0.8, 0.7, 0.5, 1.0],
    "category": ["a", "a", None, "b", "b"],
    "human": [True, False, True, None, False],
}
CHOSEN, REJECTED = [1.0, 2.0, -1.0, 0.0, 3.0], [0.0, 2.0, 0.0, 1.0, 4.0]  # right, tie, wrong, no label, wrong


@pytest.fixture
def numbers(monkeypatch, tmp_path):
    """A function that computes the numbers from given scores."""

    def numbers(chosen, rejected, prompts=None):
        scores = (torch.tensor(chosen), torch.tensor(rejected), None)
        monkeypatch.setattr(reward, "score_pairs", lambda *arguments: scores)
        context = SimpleNamespace(recipe=SimpleNamespace(reward=SimpleNamespace(transforms=[])), folder=tmp_path)
        args = SimpleNamespace(per_device_eval_batch_size=2)
        trainer = SimpleNamespace(
            args=args, model=None, data_collator=None, batch_tokens=None, reward_transforms=[]
        )  # fmt: skip
        ids = {f"{side}_ids": [[5, 2]] * len(chosen) for side in ("chosen", "rejected")}
        ids["prompt_key"] = prompts or [str(i) for i in range(len(chosen))]
        return reward._held_out_numbers(context, trainer, Dataset.from_dict(ROWS | ids))

    return numbers


def test_equal_scores_count_half(numbers):
    found = numbers(CHOSEN, REJECTED)
    assert found["accuracy"] == 1.5 / 4 and found["accuracy_interval"] == share_interval([1, 0.5, 0, 0])
    assert found["scores"]["accuracy"] == {"(none)": 0.0, "a": 0.75, "b": 0.0}
    people = found["agreement"]
    assert (people["rate"], people["n"], people["ties"]) == (2.5 / 4, 4, 1)
    assert people["interval"] == share_interval([1, 0.5, 0, 1])
    assert json.loads(json.dumps(found))["accuracy"] == 0.375


def test_pairs_of_one_prompt_are_one_cluster(numbers):
    prompts = ["x", "x", "y", "z", "y"]
    found = numbers(CHOSEN, REJECTED, prompts)
    assert found["accuracy_interval"] == share_interval([1, 0.5, 0, 0], ["x", "x", "y", "y"])
    assert found["agreement"]["interval"] == share_interval([1, 0.5, 0, 1], ["x", "x", "y", "y"])
    assert found["accuracy_interval"] != numbers(CHOSEN, REJECTED)["accuracy_interval"]


def test_without_labels_or_people_there_is_no_accuracy(numbers, monkeypatch):
    monkeypatch.setitem(ROWS, "p", [0.5] * 5)
    monkeypatch.setitem(ROWS, "human", [None] * 5)
    found = numbers(CHOSEN, REJECTED)
    assert found["accuracy"] is found["accuracy_interval"] is found["agreement"] is None
    assert found["scores"]["accuracy"] == {}


def test_a_diverged_model_is_an_error(numbers):
    with pytest.raises(RunError, match="diverged"):
        numbers([float("nan"), *CHOSEN[1:]], REJECTED)


# ---- Calibration ----------------------------------------------------------------------------------------

SOFT = 0.5 + (np.arange(2000) + 0.5) / 4000  # labels, uniform in 0.5..1


def integrated(factor):
    """Mean of sigmoid(factor * logit(p)) - p over p uniform in 0.5..1: the overconfidence.

    The confidence is at least p everywhere, so this is the calibration error for any bins.
    """
    return 2 * quad(lambda p: expit(factor * logit(p)) - p, 0.5, 1, epsabs=1e-10)[0]


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_the_more_confident_model_is_not_the_better_calibrated_one(numbers, monkeypatch, factor):
    rows = {"p": SOFT.tolist(), "category": [None] * len(SOFT), "human": [None] * len(SOFT)}
    monkeypatch.setattr(f"{__name__}.ROWS", rows)
    found = numbers((factor * logit(SOFT)).tolist(), [0.0] * len(SOFT))
    assert found["ece"] == pytest.approx(integrated(factor), abs=1e-4)  # 2000 midpoints, scores in float32
    assert (found["ece_against"], found["ece_pairs"]) == ("labels", len(SOFT))


@pytest.mark.parametrize("asked", [1.0, 0.3])
def test_what_people_chose_is_the_outcome_where_there_is_any(numbers, monkeypatch, asked):
    draw = np.random.default_rng(0)
    chosen = draw.random(len(SOFT)) < SOFT**2  # people agree less than the labels say
    human = [bool(x) if draw.random() < asked else None for x in chosen]
    rows = {"p": SOFT.tolist(), "category": [None] * len(SOFT), "human": human}
    monkeypatch.setattr(f"{__name__}.ROWS", rows)
    found = numbers(logit(SOFT).tolist(), [0.0] * len(SOFT))
    known = [(p, h) for p, h in zip(SOFT, human, strict=True) if h is not None]
    right, predicted = calibration_curve([h for _, h in known], [p for p, _ in known], n_bins=20)  # width 0.05, as ours
    counts = np.histogram([p for p, _ in known], bins=np.linspace(0.5, 1, 11))[0]
    assert found["ece"] == pytest.approx(float(counts @ abs(right - predicted)) / len(known), abs=1e-6)
    assert (found["ece_against"], found["ece_pairs"]) == ("people", len(known))


# ---- Held-out pairs -------------------------------------------------------------------------------------


@pytest.mark.trl
def test_no_held_out_pair_has_its_prompt_in_training(tiny_model, tmp_path):
    """Four pairs per prompt, as from samplers and human comparisons."""
    rows = [
        {"id": str(i), "prompt": f"what is {i // 4}?", "response_1": f"a {i}", "response_2": "the fox", "human": 1}
        for i in range(160)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nothing = dict.fromkeys(("sample", "label", "rl", "evaluate", "report"))
    data = {"prompts": None, "pairs": "pairs.jsonl", "format": "responses"}
    recipe = tiny_recipe(tmp_path, tiny_model, data=data, reward={"max_steps": 1, "eval_fraction": 0.375}, **nothing)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    train, held_out, _ = reward._datasets(Context(recipe, folder, installed_plugins()), 0.375, None)
    trained = {tuple(row["chosen_ids"][: row["prompt_length"]]) for row in train}
    leaked = sum(tuple(row["chosen_ids"][: row["prompt_length"]]) in trained for row in held_out)
    assert (len(train), len(held_out), leaked) == (100, 60, 0)
    numbers = folder.results()["reward"]
    assert (numbers["train_pairs"], numbers["eval_pairs"], numbers["eval_prompts"]) == (100, 60, 15)
