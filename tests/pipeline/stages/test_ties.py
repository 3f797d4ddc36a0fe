"""Human ties are not preferences, and human margins reach the loss."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers.recipes import WORDS, tiny_recipe
from torch.nn.functional import logsigmoid

from trl_rlaif import UserError
from trl_rlaif.evaluation import is_even
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.preferences import write_preferences
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.pipeline.work import dpo, reward
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.reward.config import RewardConfig
from trl_rlaif.reward.scoring import score_pairs

NO_MORE = {"sample": None, "label": None, "rl": None, "evaluate": None, "report": None}
RL = {"algorithm": "dpo", "kl_coef": 0.3, "max_steps": 1, "per_device_train_batch_size": 2}


def write_pairs(path, count, human, **more):
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"what is {WORDS[i % 10]} {i}?",
            "response_1": f"a {WORDS[i % 7]}",
            "response_2": f"the {i}",
            "human": human(i),
            **{name: value(i) for name, value in more.items()},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"prompts": None, "pairs": path.name, "format": "responses"}


def run(base, tiny_model, **sections):
    recipe = tiny_recipe(base, tiny_model, **{**NO_MORE, **sections})
    return recipe, run_recipe(recipe, installed_plugins(), base / "out")


def test_the_reward_model_learns_from_no_tie_of_peoples(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 12, lambda i: (1, 0, 2, None)[i % 4])
    _, folder = run(tmp_path, tiny_model, data=data, reward={"max_steps": 1, "eval_fraction": 0.0})
    rows = load_from_disk(str(folder / "preferences"))
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(12) if i % 2 == 0]
    assert all(row["p"] == 1.0 and row["human"] for row in rows)
    assert [row["chosen"][0]["content"] for row in rows][:2] == ["a quick", "the 2"]
    results = folder.results()
    assert results["reward"]["train_pairs"] == 6
    assert results["reward"]["skipped"] == {"tie": 3, "no human choice": 3}
    assert results["sample"]["ties"] == 3 and STAGES["sample"].summary(results["sample"]) == "12 pairs, 3 of them ties"


def test_dpo_learns_from_no_tie_of_peoples(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 6, lambda i: i % 3)
    _, folder = run(tmp_path, tiny_model, data=data, reward=None, rl=RL)
    numbers = folder.results()["rl"]
    assert (numbers["pairs"], numbers["skipped"]) == (4, {"tie": 2})
    assert STAGES["rl"].summary(numbers) == "4 pairs (skipped: 2 tie)"


def test_nothing_but_ties(tiny_model, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 4, lambda i: 0)
    with pytest.raises(UserError, match="no pair says which response a person preferred"):
        run(tmp_path, tiny_model, data=data)


@pytest.fixture
def labeled(tiny_model, tmp_path):
    """A function that makes the context of a run with given probabilities that response_1 is better."""

    def labeled(p, **more):
        data = write_pairs(tmp_path / "pairs.jsonl", len(p), lambda i: None, **more)
        recipe = tiny_recipe(tmp_path, tiny_model, **NO_MORE | {"reward": None, "data": data, "label": {}, "rl": RL})
        folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", only=["sample"])
        context = Context(recipe, folder, installed_plugins())
        write_preferences(context, context.pairs(), np.array(p))
        return context

    return labeled


P = [0.9, 0.5, 0.2, (0.3 + 0.7) / 2, 0.1 + 0.2 + 0.2, 0.51]


def test_dpo_learns_from_labels_of_one_half_that_both_are_equally_good(labeled):
    numbers = dpo.run(labeled(P))
    assert (numbers["pairs"], numbers["skipped"]) == (6, {})
    assert numbers["labels"] == {"soft": True, "mean_confidence": pytest.approx(3.71 / 6), "ties": 3}


def test_a_loss_that_takes_labels_as_sure_leaves_out_those_of_one_half(labeled, capsys):
    context = labeled(P)
    context.recipe.rl.config["loss_type"] = ["hinge"]
    numbers = dpo.run(context)
    assert (numbers["pairs"], numbers["skipped"]) == (3, {"tie": 3})
    assert numbers["labels"] == {"soft": False, "mean_confidence": pytest.approx(3.71 / 6), "ties": 3}
    assert "treats soft labels as certain" in (stderr := capsys.readouterr().err) and "3 of them are ties" in stderr
    # They stay in preferences/: as soft labels, they say that both responses are equally good.
    assert len(load_from_disk(str(context.folder / "preferences"))) == 6


def test_dpo_on_nothing_but_ties(labeled):
    with pytest.raises(UserError, match="Every preference is a tie"):
        dpo.run(labeled([0.5, 0.5]))


def test_one_half_but_for_rounding():
    for x in (0.1, 0.3, 0.7, 0.9, 1e-3):
        assert is_even((x + (1 - x)) / 2)
    assert not is_even(0.5001) and not is_even(1.0)


# Margins


def test_margins_reach_the_loss(tiny_model, tmp_path):
    margins = [0.0, 0.5, 2.0, None, -1.0, 3.0]
    data = write_pairs(tmp_path / "pairs.jsonl", 6, lambda i: 1 + i % 2, margin=lambda i: margins[i])
    sections = NO_MORE | {"data": data, "reward": {"eval_fraction": 0.0}}
    recipe = tiny_recipe(tmp_path, tiny_model, **sections)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out", only=["sample"])
    context = Context(recipe, folder, installed_plugins())
    reward.preferences_of_people(context, "reward")
    wanted = {f"p{i}": margin or 0.0 for i, margin in enumerate(margins)}
    rows = load_from_disk(str(folder / "preferences"))
    assert dict(zip(rows["id"], rows["margin"], strict=True)) == wanted

    train, _, _ = reward._datasets(context, 0.0, None)
    config = RewardConfig(str(tmp_path / "trained"), use_cpu=True, report_to="none", bf16=False, seed=7)
    torch.manual_seed(7)
    trainer = reward._trainer(context, config, train)
    trainer.model.eval()
    trainer._set_signature_columns_if_needed()
    kept = [{k: v for k, v in row.items() if k in trainer._signature_columns} for row in train]
    batch = trainer.data_collator(kept)
    chosen, rejected, _ = score_pairs(trainer.model, train, trainer.data_collator, 6, 8192)
    expected = -logsigmoid(chosen.double() - rejected.double() - torch.tensor(train["margin"]).double()).mean()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_margin_counts_where_the_label_agrees_with_people(labeled):
    p = {"p0": 0.9, "p1": 0.2, "p2": 0.9, "p3": 0.7}
    context = labeled(list(p.values()), margin=lambda i: 2.0 + i)
    assert "margin" not in load_from_disk(str(context.folder / "preferences")).column_names
    people = {"p0": 1, "p1": 1, "p2": 2, "p3": 1}
    pairs = [replace(pair, human=people[pair.id]) for pair in context.pairs()]
    write_preferences(context, pairs, np.array(list(p.values())))
    assert load_from_disk(str(context.folder / "preferences"))["margin"] == [2.0, 0.0, 0.0, 5.0]
