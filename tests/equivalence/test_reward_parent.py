"""With hard labels and no transforms, RewardTrainer gives the losses of trl.RewardTrainer."""

from __future__ import annotations

import pytest
from datasets import Dataset
from helpers.tiny import make_scorer, make_tokenizer
from peft import LoraConfig
from trl import RewardConfig
from trl import RewardTrainer as ParentTrainer

from trl_rlaif import RewardTrainer

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
    args = RewardConfig(
        str(folder),
        per_device_train_batch_size=3,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model=make_scorer(len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
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
    assert len({round(loss, 4) for loss in parent}) > 4  # it learns: the comparison is not of constants


def test_soft_labels_change_the_loss(tmp_path):
    hard = _losses(RewardTrainer, tmp_path / "hard", p=1.0)
    soft = _losses(RewardTrainer, tmp_path / "soft", p=0.7)
    assert abs(hard[0] - soft[0]) > 1e-3
