"""Adapters are placed where they work; other targets are refused, and working ones are suggested."""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset
from helpers.families import make_family, save_family
from helpers.reward import small_config
from helpers.tiny import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from trl_rlaif import RewardTrainer, SharedBase, UserError
from trl_rlaif.models.adapters import fitted
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.models.shared_model import backbone

pytestmark = pytest.mark.trl


def _adapted(model) -> list[str]:
    return sorted({name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name})


@pytest.mark.parametrize(
    ("kind", "reason", "targets"),
    [
        ("mamba2", "out_proj", ["in_proj"]),  # PEFT refuses it: fused kernels bypass it
        (
            "llama4_text",
            "router returns more than a tensor",
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
    ],
)
def test_targets_that_cannot_work_are_refused_with_targets_that_can(kind, reason, targets):
    model = make_family(kind)
    with pytest.raises(UserError, match=reason) as caught:
        SharedBase(model, LoraConfig(r=2, target_modules="all-linear"))
    named = re.search(r"target_modules: \[(.*)\]", caught.value.problems[0].fix)[1].split(", ")
    assert named == targets
    assert not _adapted(model), "the model was changed"
    shared = SharedBase(model, LoraConfig(r=2, target_modules=named, init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain, changed = (shared.hidden(role, input_ids=ids) for role in (None, "policy"))
    assert changed.isfinite().all() and not torch.allclose(plain, changed)


def test_an_adapter_that_would_change_nothing_is_refused():
    """Mamba multiplies by dt_proj's weight directly: an adapter on that layer would silently get no gradient."""
    with pytest.raises(UserError, match="without calling them") as caught:
        SharedBase(make_family("mamba"), LoraConfig(r=2, target_modules=["dt_proj"]))
    assert caught.value.problems[0].fix.endswith("[in_proj, x_proj].")


def test_the_reward_trainer_refuses_them_too(tmp_path):
    folder = save_family("mamba2", tmp_path / "model")
    with pytest.raises(UserError, match=r"target_modules: \[in_proj\]"):
        RewardTrainer(
            model=load_model(ModelSpec(folder), num_labels=1),
            args=small_config(tmp_path),
            train_dataset=Dataset.from_list([{"chosen_ids": [5, 2], "rejected_ids": [6, 2]}]),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]),
        )


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj"]])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_what_reads_images_gets_no_adapter(kind, targets):
    model = make_family(kind, auto=AutoModelForImageTextToText)
    text = next(name for name, module in model.named_modules() if module is backbone(model))
    assert text == "model.language_model"
    everywhere = get_peft_model(make_family(kind, auto=AutoModelForImageTextToText), LoraConfig(target_modules=targets))
    wanted = [name for name in _adapted(everywhere) if f".{text}." in name]
    shared = SharedBase(model, LoraConfig(r=2, target_modules=targets))
    assert _adapted(shared.peft) == wanted != []
    if targets == "all-linear" or kind == "gemma3":  # its vision tower names its layers as text models do
        assert wanted != _adapted(everywhere)


def test_an_adapter_of_another_model_is_refused_as_reward(tmp_path):
    """Its layers have other names: PEFT alone would leave the reward adapter at its random initialization."""
    folder = save_family("qwen3_5", tmp_path / "model")
    other = make_family("gemma3_text", auto=AutoModelForSequenceClassification)
    lora = LoraConfig(r=2, target_modules=["o_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    peft = get_peft_model(other, lora)
    peft.base_model.score.modules_to_save["default"].weight.data = peft.base_model.score.weight.data[:1].clone()
    peft.save_pretrained(tmp_path / "reward")
    shared = SharedBase(load_model(ModelSpec(folder)), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(UserError, match="does not fit this base"):
        shared.add_reward(tmp_path / "reward")
    assert "reward" not in shared.heads


def test_others_than_lora_and_what_fits_stay_as_they_are():
    model, config = make_family("granite"), LoraConfig(r=3, target_modules="all-linear")
    assert fitted(config, model).to_dict() == config.to_dict()
