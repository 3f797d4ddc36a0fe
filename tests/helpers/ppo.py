"""A PPO trainer on a tiny model, for testing options."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig

from helpers.rewards import length_penalty
from helpers.tiny import make_llama, make_tokenizer
from trl_rlaif import PPOConfig, PPOTrainer

WORDS = "quick brown fox lazy dog capital city country judge over".split()


def prompts(chat=False):
    prompts = [f"what is the {w}?" for w in WORDS]
    rows = [[{"role": "user", "content": p}] for p in prompts] if chat else prompts
    return Dataset.from_dict({"prompt": rows, "category": ["a", "b"] * 5, "answer": WORDS})


def small_trainer(folder, *, dataset=None, model=None, trainer_kwargs=None, template=None, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    arguments = {
        "per_device_train_batch_size": 4,
        "total_episodes": 12,
        "response_length": 8,
        "learning_rate": 1e-2,
        "num_ppo_epochs": 1,
        "num_sample_generations": 0,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "stop_token": "eos",
        **options,
    }
    torch.manual_seed(0)
    kwargs = {"reward_funcs": [length_penalty], "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    return PPOTrainer(
        PPOConfig(str(folder), **arguments),
        tokenizer,
        model or make_llama(len(tokenizer)),
        train_dataset=prompts() if dataset is None else dataset,
        **{**kwargs, **(trainer_kwargs or {})},
    )


def numbers(trainer):
    """The logged metrics, without timings."""
    timed = ("eps", "time/")
    return [{k: v for k, v in entry.items() if not k.startswith(timed)} for entry in trainer.state.log_history]
