"""`rl.algorithm: dpo` against a plain script with TRL's DPOTrainer, and with another start or people's choices."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import load_from_disk
from helpers.recipes import tiny_recipe, write_recipe
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_rlaif import UserError
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.runner import run_recipe
from trl_rlaif.stages.context import Context
from trl_rlaif.stages.dpo import build_trainer

pytestmark = pytest.mark.trl

RL = {"algorithm": "dpo", "kl_coef": 0.3, "num_train_epochs": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    base = tmp_path_factory.mktemp("dpo")
    recipe = tiny_recipe(base, tiny_model, reward=None, rl=RL)
    return recipe, run_recipe(recipe, installed_plugins(), base / "out")


def test_the_policy_is_that_of_a_plain_script(finished, tiny_model, tmp_path):
    recipe, folder = finished
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(7)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=DPOConfig(
            str(tmp_path), beta=0.3, learning_rate=1e-3, num_train_epochs=2, per_device_train_batch_size=4, seed=7,
            bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", use_cpu=True,
        ),
        train_dataset=load_from_disk(str(folder / "preferences")).select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    plain = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    ours = load_file(folder / "policy" / "adapter_model.safetensors")
    assert plain.keys() == ours.keys()
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


def test_its_results_and_what_it_made_no_use_of(finished):
    _, folder = finished
    numbers = folder.results()["rl"]
    assert numbers["updates"] == 6 and numbers["pairs"] == 10
    assert {"response_length", "total_episodes", "num_ppo_epochs"} <= set(numbers["ignored"])
    assert "kl_coef" not in numbers["ignored"] and "learning_rate" not in numbers["ignored"]
    assert 0 <= folder.results()["evaluate"]["sets"]["test"]["win_rate"] <= 1
    assert (folder / "report.html").exists()


def test_the_start_of_sft_is_the_reference(tiny_model, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "what?", "completion": "the fox"}) + "\n")
    sft = {"data": "sft.jsonl", "max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 0.1}
    recipe = tiny_recipe(tmp_path, tiny_model, sft=sft, reward=None, rl=RL, evaluate=None, report=None)
    plugins = installed_plugins()
    folder = run_recipe(recipe, plugins, tmp_path / "out", only=["sft", "sample", "label"])
    trainer, _ = build_trainer(Context(recipe, folder, plugins))
    start = load_file(folder / "sft" / "adapter_model.safetensors")
    for part in ("default", "ref"):
        state = dict(trainer.model.named_parameters())
        for name, value in start.items():
            torch.testing.assert_close(state[name.replace(".weight", f".{part}.weight")].cpu(), value, rtol=0, atol=0)


def test_it_needs_preferences(tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model, label=None, reward=None, rl=RL)
    with pytest.raises(UserError, match="'dpo' has no preferences to learn from"):
        parse_recipe(path, registry=installed_plugins().registry)
    path = write_recipe(tmp_path, tiny_model, reward=None, rl=RL | {"betta": 0.2})
    with pytest.raises(UserError, match="betta"):
        parse_recipe(path, registry=installed_plugins().registry)
