"""With nothing added, PPOTrainer gives the numbers of trl.experimental.ppo.PPOTrainer, if TRL has it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny import make_llama, make_scorer, make_tokenizer
from peft import LoraConfig
from transformers import DataCollatorWithPadding

from trl_rlaif import PPOConfig, PPOTrainer

pytestmark = pytest.mark.trl
parent_ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL has none since 1.13", exc_type=ImportError)

# All but policy/entropy_avg: TRL's trainer also averages over the padding after a response.
COMPARED = [
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/num_eos_tokens",
    "lr",
    "episode",
]


def _train(trainer_class, config_class, folder, *, lora=False, shown=0, **options):
    tokenizer = make_tokenizer()
    texts = [f"what is the {w}?" for w in "quick brown fox lazy dog capital city country judge over".split()]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(t)["input_ids"] for t in texts]})
    policy = make_llama(len(tokenizer), seed=0)
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    torch.manual_seed(11)
    np.random.seed(0)
    args = config_class(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        total_episodes=12,
        response_length=12,
        learning_rate=1e-2,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        per_device_eval_batch_size=4,
        num_sample_generations=shown,
        **options,
        # TRL scores truncated responses without an end token, and averages losses over each micro-batch.
        **({"score_at_end": False, "loss_reduction": "micro_batch"} if config_class is PPOConfig else {}),
    )
    trainer = trainer_class(
        args,
        tokenizer,
        policy,
        None if lora else copy.deepcopy(policy),
        make_scorer(len(tokenizer), seed=1),
        dataset,
        make_scorer(len(tokenizer), seed=2),
        DataCollatorWithPadding(tokenizer) if trainer_class is parent_ppo.PPOTrainer else None,
        dataset.select(range(5)) if shown else None,
        peft_config=peft_config,
    )
    logged = []
    trainer.log = lambda metrics, *a: logged.append(dict(metrics))
    trainer.train()
    return logged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_token": "eos", "missing_eos_penalty": 1.0},
        {"kl_estimator": "k3", "gamma": 0.9, "kl_coef": 0.3},
        {"lora": True, "stop_token": "eos"},
        {"shown": 2, "stop_token": "eos"},
    ],
    ids=["defaults", "stop at eos", "k3 and discount", "LoRA policy", "samples shown"],
)
def test_three_updates_equal_the_parents(tmp_path, options):
    parent = _train(parent_ppo.PPOTrainer, parent_ppo.PPOConfig, tmp_path / "parent", **options)
    ours = _train(PPOTrainer, PPOConfig, tmp_path / "ours", **options)
    assert len(parent) == len(ours) == 3
    for theirs, mine in zip(parent, ours, strict=True):
        for name in COMPARED:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-4), name
    # The comparison is meaningful: the policy moved, and the numbers differ from update to update.
    assert len({round(m["objective/scores"], 6) for m in ours}) == 3
    assert abs(ours[-1]["objective/kl"]) > 1e-3
