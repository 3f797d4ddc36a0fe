"""Reward models of all causal families, even without a classifier in transformers: trained, saved, loaded, in PPO."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.families import save_family
from helpers.reward import small_config
from helpers.tiny import make_tokenizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import RewardTrainer as TrlRewardTrainer

from trl_rlaif import RewardTrainer, SharedBase, load_reward_model
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.models.role_models import SeparateRoleModels
from trl_rlaif.models.shared_model import backbone

pytestmark = pytest.mark.trl

# No classifier in transformers; layers with a state; another name for the backbone; two kinds of multimodal models.
KINDS = ["granite", "mamba2", "llama4_text", "gemma3", "qwen3_5"]
TARGETS = {"mamba2": ["in_proj"], "qwen3_5": ["q_proj", "in_proj_qkv", "down_proj"]}
IDS = torch.tensor([[5, 6, 7, 8, 0, 0], [3, 4, 5, 6, 7, 9]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
PAIRS = Dataset.from_list(
    [
        {"chosen_ids": [5, 9, 4, 7, 8, 2], "rejected_ids": [5, 9, 4, 6]},
        {"chosen_ids": [5, 3, 2], "rejected_ids": [5, 3, 8, 8, 9, 10, 11, 12]},
    ]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_family(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_head_of_the_causal_models_own_hidden_state(folders, kind):
    scorer = load_model(ModelSpec(folders[kind]), num_labels=1).eval()
    causal = AutoModelForCausalLM.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        hidden = causal(**INPUTS, use_cache=False, output_hidden_states=True).hidden_states[-1]
        found = scorer(**INPUTS, use_cache=False).logits
        torch.testing.assert_close(found, scorer.score(hidden[[0, 1], [3, 5]]), rtol=1e-4, atol=1e-5)
    names = {name for name, _ in backbone(causal).named_parameters()}
    assert {name for name, _ in backbone(scorer).named_parameters()} == names
    assert scorer.num_labels == scorer.config.num_labels == 1


def _train(trainer_class, model, folder, lora=None):
    trainer = trainer_class(
        model=model,
        args=small_config(folder, max_steps=3, per_device_train_batch_size=2, lr_scheduler_type="constant"),
        train_dataset=PAIRS,
        processing_class=make_tokenizer(),
        peft_config=lora,
    )
    trainer.train()
    return trainer.model.eval(), [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_as_by_trl_and_loads_again_whole(folders, kind, tmp_path):
    runs = []
    for trainer_class in (TrlRewardTrainer, RewardTrainer):
        torch.manual_seed(0)
        model = load_model(ModelSpec(folders[kind]), num_labels=1)
        runs.append(_train(trainer_class, model, tmp_path / "run"))
    (_, theirs), (model, ours) = runs
    assert ours == pytest.approx(theirs, rel=2e-4)
    model.save_pretrained(tmp_path / "saved")
    again = load_reward_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**INPUTS, use_cache=False).logits, model(**INPUTS, use_cache=False).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_it_loads_again_and_plays_the_reward_in_ppo(folders, kind, tmp_path):
    targets = TARGETS.get(kind, ["q_proj", "down_proj"])
    lora = LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"])
    base = load_model(ModelSpec(folders[kind]), num_labels=1)
    model, _ = _train(RewardTrainer, base, tmp_path / "run", lora)
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward")
    shared = SharedBase(load_model(ModelSpec(folders[kind])), LoraConfig(r=4, target_modules=targets))
    shared.add_reward(tmp_path / "reward")
    ids = IDS.flip(1)  # PPO pads prompts on the left
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        assert torch.equal(again(**inputs, use_cache=False).logits, expected)
        hidden = shared.hidden("reward", **inputs)[:, -1]
        torch.testing.assert_close(shared.head("reward", hidden), expected, rtol=1e-4, atol=1e-5)
        separate = SeparateRoleModels(None, None, None, again).scores(inputs, 0)
        torch.testing.assert_close(separate, expected, rtol=1e-4, atol=1e-5)


def test_it_is_held_in_four_bits_and_packed(folders, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    base = load_model(ModelSpec(folders["granite"], "float32", "nf4"), num_labels=1)
    trainer = RewardTrainer(
        model=base,
        args=small_config(tmp_path, max_steps=1, bf16=True),
        train_dataset=PAIRS,
        processing_class=make_tokenizer(),
        peft_config=lora,
        packing=True,
    )
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", dtype="float32", quantization="nf4")
    assert again(**INPUTS, use_cache=False).logits.isfinite().all()


def test_the_trainer_finds_the_class_by_the_path(folders, tmp_path):
    model, _ = _train(RewardTrainer, folders["granite"], tmp_path)
    assert type(model).__name__ == "GraniteForSequenceClassification"
