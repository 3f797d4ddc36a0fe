"""A run with the Advantage Model and the regulator, from pairs to a policy, on a tiny model."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.recipes import tiny_recipe
from helpers.tiny import make_gpt2, make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl_rlaif_regulator import DistributionRegulator

from trl_rlaif import RewardTrainer, SharedBase, UserError, load_reward_model
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.pipeline.work.reward import transformed
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.reward.log_ratios import response_logprobs

TRANSFORMS = {
    "reward": {"transforms": [{"advantage": {"margin": 0.9, "adapt": "variance"}}]},
    "rl": {"transforms": ["advantage", {"distribution_regulator": {"warm_up": 1}}]},
}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    base = tmp_path_factory.mktemp("advantage")
    recipe = tiny_recipe(base, tiny_model, report=None, **TRANSFORMS)
    return recipe, run_recipe(recipe, installed_plugins(), base / "out")


def test_the_results_tell_before_from_after(finished):
    numbers = finished[1].results()["reward"]
    before, after = numbers["scores"], numbers["transformed"]
    assert set(before["categories"]) == set(after["categories"]) == {"a", "b"}
    assert before["categories"]["a"]["mean"] != after["categories"]["a"]["mean"]  # e(x) is no longer zero
    assert numbers["after_each"] == {"advantage": after}
    assert 0 <= numbers["ece"] <= 1 and set(before["accuracy"]) <= {"a", "b"}


def test_held_out_scores_are_regulated_as_one_pool():
    """Against numpy: all categories get the same mean and standard deviation, as a selector would see them."""
    generator, categories = torch.Generator().manual_seed(0), ["a", "b", "c"] * 20
    scale, offset = (torch.tensor(values * 40) for values in ([1.0, 4.0, 0.3], [0.0, 9.0, -2.0]))
    raw = offset + scale * torch.randn(120, generator=generator)
    [found] = transformed([DistributionRegulator(prior=0, bound=1e6)], raw, None, categories)
    for i in range(3):
        plain = raw[i::3].numpy()
        expected = (plain - plain.mean()) / plain.std(ddof=1)
        np.testing.assert_allclose(found[i::3].numpy(), expected, atol=1e-4)


def test_ppo_gets_bounded_regulated_scores_and_logs_them(finished):
    rows = [row for row in read_lines(finished[1] / "metrics.jsonl") if row["stage"] == "rl"]
    assert {"regulator/a/mean", "regulator/b/std", "regulator/all/mean", "regulator/a/drift"} <= set(rows[-1])
    assert all(abs(row["regulator/all/mean"]) <= 4 * 0.9 for row in rows)
    spreads = {"raw", "AdvantageModel", "DistributionRegulator"}
    expected = {name: np.mean([row[f"spread/{name}"] for row in rows]) for name in spreads}
    assert finished[1].results()["rl"]["spread_last"] == pytest.approx(expected)


def test_ppo_takes_over_the_options_and_the_margins_of_reward_training(finished):
    recipe, folder = finished
    trained = torch.load(folder / "reward" / "transform_advantage.pt", weights_only=True)
    assert trained["factor"]
    transform = Context(recipe, folder, installed_plugins()).transforms("rl")[0]
    assert transform.options.margin == 0.9 and transform.state_dict() == trained


def test_the_reward_model_loads_as_one_thing(finished, tiny_model):
    _, folder = finished
    model = load_reward_model(folder / "reward")
    shared = SharedBase(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "policy")
    shared.add_reward(folder / "reward")
    ids = torch.tensor([[5, 9, 12, 3, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        found = shared.eval().head("reward", shared.hidden("reward", input_ids=ids)[:, -1])
    assert expected.shape == (1, 2) and expected.abs().min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_prompts_without_categories_get_clusters(tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model, report=None, data={"category": "nowhere", "clusters": 2}, **TRANSFORMS)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    names = {"cluster 1", "cluster 2"}
    assert {pair["category"] for pair in read_lines(folder / "pairs.jsonl")} == names
    assert set(folder.results()["reward"]["scores"]["categories"]) <= names
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert {f"regulator/{name}/mean" for name in names} <= set(rows[-1])
    assert {sample["category"] for sample in read_lines(folder / "samples.jsonl")} <= names
    assert len(json.loads((folder / "clusters.json").read_text())["centres"]) == 2


def test_the_scores_of_held_out_pairs_are_kept_and_made_anew_with_their_stage(finished):
    folder = finished[1]
    rows, numbers = read_lines(folder / "reward_scores.jsonl"), folder.results()["reward"]
    assert len(rows) == numbers["eval_pairs"] > 0
    columns = ["prompt_key", "category", "p", "human", "chosen", "rejected", "chosen_after", "rejected_after"]
    assert all(list(row) == columns and 0.5 <= row["p"] <= 1 and row["human"] is None for row in rows)
    for key, names in (("scores", columns[4:6]), ("transformed", columns[6:])):
        for category, figures in numbers[key]["categories"].items():
            found = [row[name] for name in names for row in rows if row["category"] == category]
            assert figures["n"] == len(found) and figures["mean"] == pytest.approx(sum(found) / len(found))
    clear = [row["chosen"] > row["rejected"] for row in rows if row["p"] != 0.5]
    assert numbers["accuracy"] == pytest.approx(sum(clear) / len(clear))
    assert "reward_scores.jsonl" in STAGES["reward"].outputs


def test_policies_that_wrote_the_responses_become_importance_weights(finished, tiny_model, tmp_path, monkeypatch):
    seen = []
    original = RewardTrainer.__init__

    def watched(self, *args, **kwargs):
        seen.append((kwargs["train_dataset"], kwargs["packing"], kwargs["batch_tokens"]))
        original(self, *args, **kwargs)

    monkeypatch.setattr(RewardTrainer, "__init__", watched)
    other = str(finished[1] / "policy")
    reward = {**TRANSFORMS["reward"], "policies": ["base", other], "packing": False, "batch_tokens": 99}
    recipe = tiny_recipe(tmp_path, tiny_model, report=None, rl=None, evaluate=None, reward=reward)
    folder = run_recipe(recipe, installed_plugins(), tmp_path / "out")
    ((data, *options),) = seen
    assert options == [False, 99]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = response_logprobs(base, data["chosen_ids"], data["prompt_length"])
    moved = response_logprobs(PeftModel.from_pretrained(base, other), data["chosen_ids"], data["prompt_length"])
    ratios = torch.tensor(data["chosen_log_ratios"], dtype=torch.float64)
    assert ratios[:, 0].tolist() == [0.0] * len(data)  # the initial policy is a new adapter on the base
    torch.testing.assert_close(ratios[:, 1], plain - moved, rtol=0, atol=1e-4)
    assert (plain - moved).abs().max() > 1e-3
    # RL rewards the trained advantage: the transform's state holds N and the mean share.
    every = torch.cat(
        [torch.tensor(data[f"{side}_log_ratios"], dtype=torch.float64) for side in ("chosen", "rejected")]
    )
    recipe = tiny_recipe(tmp_path, tiny_model, report=None, evaluate=None, **TRANSFORMS | {"reward": reward})
    transform = Context(recipe, folder, installed_plugins()).transforms("rl")[0]
    paid = transform.transform(
        torch.tensor([0.5]), SimpleNamespace(model_scores=None, expected=torch.tensor([0.3]), categories=[None])
    )
    share = (every.exp().sum(1) / 2).clamp(max=0.5).mean().item()
    assert paid.item() == pytest.approx((1 - share) * 0.5 - 0.5 * 0.3, abs=1e-6)


@pytest.mark.parametrize("other", ["wider", "deeper", "gpt2", "more"])
def test_an_adapter_of_another_base_is_named(tiny_model, tmp_path, other):
    lora = {"r": 4, "target_modules": "all-linear"}
    base = {"wider": lambda: make_llama(hidden_size=64), "gpt2": make_gpt2}.get(other, make_llama)()
    if other == "deeper":
        base.model.layers.append(copy.deepcopy(base.model.layers[0]))
    modules = ["lm_head"] if other == "more" else None
    get_peft_model(base, LoraConfig(**lora, modules_to_save=modules)).save_pretrained(tmp_path)
    shared = SharedBase(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**lora))
    with pytest.raises(UserError, match="does not fit this base") as error:
        shared.load_adapter("other", tmp_path)
    assert error.value.problems[0].where == str(tmp_path)
