"""With hard labels and no transforms, RewardTrainer gives the losses and gradients of trl.RewardTrainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.reward import small_config
from helpers.tiny import make_scorer, make_tokenizer
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)
from trl import RewardTrainer as ParentTrainer

from trl_rlaif import RewardTrainer
from trl_rlaif.models.loading import keep_gradients

pytestmark = pytest.mark.trl

WORDS = "quick brown fox lazy dog capital city country judge over".split()


def _losses(trainer_class, folder, *, p=None, **options):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is the {w}?"}],
            "chosen": [{"role": "assistant", "content": f"the {w} is a city"}],
            "rejected": [{"role": "assistant", "content": f"lazy {w[::-1]} dog"}],
        }
        for w in WORDS
    ]
    if p is not None:
        rows = [{**row, "p": p} for row in rows]
    tokenizer = make_tokenizer()
    peft_config = options.pop("peft_config", None)
    # TRL reads scores at the line break that the template adds after the end of a turn.
    where = {"score_at_end": False} if trainer_class is RewardTrainer else {}
    args = small_config(folder, per_device_train_batch_size=3, num_train_epochs=2, **options)
    trainer = trainer_class(
        model=make_scorer(len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        **where,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center_rewards_coefficient": 0.05},
        {"peft_config": LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])},
    ],
    ids=["plain", "centred", "LoRA"],
)
def test_losses_equal_the_parents(tmp_path, options):
    parent = _losses(ParentTrainer, tmp_path / "parent", **dict(options))
    without_p = _losses(RewardTrainer, tmp_path / "ours", **dict(options))
    hard = _losses(RewardTrainer, tmp_path / "hard", p=1.0, **dict(options))
    assert len(parent) == 8
    assert without_p == pytest.approx(parent, abs=1e-5, rel=0)  # pairs are packed
    assert hard == pytest.approx(parent, abs=1e-5, rel=0)  # pairs are packed
    assert len({round(loss, 4) for loss in parent}) > 4  # it learns, so these are not constants


def test_soft_labels_change_the_loss(tmp_path):
    hard = _losses(RewardTrainer, tmp_path / "hard", p=1.0)
    soft = _losses(RewardTrainer, tmp_path / "soft", p=0.7)
    assert abs(hard[0] - soft[0]) > 1e-3


LAYERS = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": 400, "num_labels": 1, "pad_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, **LAYERS, **COMMON)),
    "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(num_key_value_heads=2, **LAYERS, **COMMON)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **COMMON)),
}


def _loss_and_gradients(trainer_class, folder, model, lora):
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(3, 400, (count,), generator=generator).tolist()

    rows = []
    for i in range(6):
        prompt = tokens(3 + 2 * i)
        rows.append({"chosen_ids": prompt + tokens(9 - i), "rejected_ids": prompt + tokens(2 + i)})
    options = {
        "args": small_config(folder),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": make_tokenizer(),
    }
    torch.manual_seed(1)
    trainer = trainer_class(model=model, peft_config=lora, **options)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts the adapters of a 4-bit base to bfloat16
            parameter.data = parameter.data.float()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(6)]))
    loss.backward()
    packed = getattr(trainer.data_collator, "packed", None)
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, packed


@pytest.mark.parametrize("weights", ["full", "LoRA", "NF4"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_loss_and_gradients_equal_the_parents_in_float32(tmp_path, kind, weights):
    if weights == "NF4" and kind == "gpt2":
        pytest.skip("transformers does not quantize GPT-2's Conv1D layers")
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantization = nf4 if weights == "NF4" else None
    lora = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["score"], "init_lora_weights": False}
    found = []
    for trainer_class in (ParentTrainer, RewardTrainer):
        load = AutoModelForSequenceClassification.from_pretrained
        model = keep_gradients(load(tmp_path / "base", dtype=torch.float32, quantization_config=quantization))
        config = None if weights == "full" else LoraConfig(task_type="SEQ_CLS", **lora)
        found.append(_loss_and_gradients(trainer_class, tmp_path / "run", model, config))
    (loss, gradients, _), (our_loss, our_gradients, packed) = found
    assert packed is True
    assert our_loss == pytest.approx(loss, rel=1e-5)
    assert our_gradients.keys() == gradients.keys() and len(gradients) > 4
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():  # if chosen and rejected cancel, only rounding is left
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, name
