"""``push_to_hub`` in a recipe and in PPOConfig, against a local server; and pushes that are refused up front."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from helpers.hub import Repo, fake_hub
from helpers.recipes import run_cli, tiny_recipe, write_recipe
from helpers.trained import add_trained, make_run
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_rlaif import PPOConfig, PPOTrainer, RunError, UserError
from trl_rlaif.pipeline.pushing import check_pushes, push_asked
from trl_rlaif.pipeline.redo import plan
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

NONE = dict.fromkeys(("sample", "label", "rl", "evaluate", "report"))
PUSHED = {"push_to_hub": True, "hub_model_id": "me/rewards"}


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """A fake Hub with the tiny model as ``me/base``."""
    with fake_hub() as hub:
        hub.join(monkeypatch, tmp_path / "hf")
        hub.repos["me/base"] = Repo(False, {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
        yield hub


def test_a_run_pushes_what_it_has_trained(hub, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"what is {i}?", "chosen": f"it is {i}", "rejected": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl", "format": "preference"}
    recipe = write_recipe(tmp_path, "me/base", **NONE, data=data, reward={**PUSHED, "num_train_epochs": 1})
    code, said = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out")
    assert code == 0 and f"reward: {hub.endpoint}/me/rewards" in said, said
    repo = hub.repos["me/rewards"]
    assert repo.private and repo.commits == ["tiny: reward"]  # once, at the end of the run
    assert repo.files["adapter_model.safetensors"] == (tmp_path / "out/reward/adapter_model.safetensors").read_bytes()
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.base_model == "me/base" and "| held-out pairs | reward model's accuracy |" in card.text
    # Resuming pushes again, which changes nothing.
    assert run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out", "--resume")[0] == 0
    assert set(hub.repos) == {"me/base", "me/rewards"}


def test_names_visibility_and_stages(hub, tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model)
    for what in ("policy", "reward"):
        add_trained(run, what)
    asked = {"push_to_hub": True, "hub_private_repo": False}
    recipe = tiny_recipe(tmp_path, "me/base", rl=asked, reward=PUSHED)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(tiny_model, "me/base"))
    push_asked(recipe, run.path, only=["rl"])
    assert set(hub.repos) == {"me/base", "me/tiny-policy"} and hub.repos["me/tiny-policy"].private is False
    push_asked(tiny_recipe(tmp_path, "me/base", rl={"push_to_hub": False}), run.path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="The run is complete. Push it with: trl-rlaif export .* --repo me/rewards"):
        push_asked(recipe, run.path, only=["reward"])


def test_asking_for_it_redoes_nothing(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model)
    plain, asked = (tiny_recipe(tmp_path, tiny_model, rl=keys) for keys in ({}, {"push_to_hub": True}))
    found = [{name: each.fingerprint for name, each in plan(recipe, run).items()} for recipe in (plain, asked)]
    assert found[0] == found[1]


def test_what_others_could_not_load_is_refused_first(tiny_model, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_model, reward=PUSHED)
    code, said = run_cli(monkeypatch, capsys, "check", recipe)
    assert code == 2 and "which others do not have" in said and "recipe.yaml:" in said
    check_pushes(tiny_recipe(tmp_path, "org/base", reward=PUSHED))
    path = write_recipe(tmp_path, "org/base", reward=PUSHED)
    variants = [{name: {"rl": {"kl_coef": coef}}} for name, coef in (("a", 0.1), ("b", 0.2))]
    path.write_text(path.read_text() + yaml.safe_dump({"compare": variants}))
    compared = parse_recipe(path, registry=installed_plugins().registry)
    with pytest.raises(UserError, match="recipe.yaml:.*The variants of a comparison are not pushed"):
        check_pushes(compared)


@pytest.mark.parametrize(
    ("section", "keys", "what"),
    [
        ("sft", {"data": "train.jsonl", "push_to_hub": True}, "rl.push_to_hub pushes the policy"),
        ("rl", {"hub_token": "hf_x"}, "`hf auth login` or the variable HF_TOKEN gives it"),
        ("rl", {"hub_strategy": "checkpoint"}, "a model is pushed once the run ends"),
    ],
)
def test_keys_that_cannot_be_set(tiny_model, tmp_path, section, keys, what):
    with pytest.raises(UserError, match=what):
        tiny_recipe(tmp_path, tiny_model, **{section: keys})


def test_ppo_pushes_the_policy_when_it_is_saved(hub, tiny_model, tmp_path):
    args = PPOConfig(
        str(tmp_path / "run"), per_device_train_batch_size=2, total_episodes=2, response_length=4, bf16=False,
        num_ppo_epochs=1, push_to_hub=True, hub_model_id="me/ppo", report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args, None, tiny_model, train_dataset=Dataset.from_dict({"prompt": ["a city?", "a dog?"]}),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    assert "adapter_model.safetensors" not in hub.repos["me/ppo"].files
    trainer.save_model()
    written = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert hub.repos["me/ppo"].files["adapter_model.safetensors"] == written
    assert "README.md" in hub.repos["me/ppo"].files
