"""A PPO task with a known optimum: a response of all "yes" earns 1.

Run as a script (tests/ on PYTHONPATH), this is one of several processes of a run.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.processes import write_result
from helpers.tiny import make_llama
from trl_rlaif import PPOConfig, PPOTrainer
from trl_rlaif.models.sharding import is_shared_out

WORDS = "the what is a yes no fox dog city moon red blue".split()
RESPONSE_LENGTH = 4
# Metrics to compare: without timings, and without the variance over micro-batches, which differ between runs.
METRICS = [
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "score/share_of_yes",
    "rollout/length",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "episode",
    "lr",
]
# With use_cpu, accelerate ignores DeepSpeed; without use_cpu and a GPU, it needs an explicit backend.
_ON_CPU = {"ddp_backend": "gloo"} if "ACCELERATE_USE_DEEPSPEED" in os.environ else {"use_cpu": True}


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that a text shows its tokens. End and padding are the last two ids."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<end>", "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="the"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", padding_side="left")


def make_policy() -> LlamaForCausalLM:
    """A model with only the words as its vocabulary: it cannot sample end or padding, so every response is full length.

    Wide enough to become certain of a word: the last norm bounds the logits, and no adapter follows it.
    """
    return make_llama(len(WORDS), hidden_size=64)


def make_prompts(count: int) -> Dataset:
    """``count`` different prompts of four tokens; three eighths are of category a, the others of b."""
    prompts = [f"what is {x} {y}" for x in WORDS for y in WORDS][:count]
    categories = ["a" if i % 8 < 3 else "b" for i in range(count)]
    return Dataset.from_dict({"prompt": prompts, "category": categories})


def share_of_yes(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of the response's tokens that are "yes": 1/12 by chance, 1 at best."""
    return [text.split().count("yes") / RESPONSE_LENGTH for text in completions]


def make_trainer(
    folder: Path, *, prompts: int, kind: type[PPOTrainer] = PPOTrainer, model: Any = None, **options: Any
) -> PPOTrainer:
    """A trainer for the task with ``prompts`` prompts; ``options`` go to PPOConfig."""
    arguments = {
        "response_length": RESPONSE_LENGTH,
        "temperature": 1.0,
        "num_sample_generations": 0,
        "lr_scheduler_type": "constant",
        **_ON_CPU,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **options,
    }
    policy = make_policy() if model is None else model
    torch.manual_seed(0)  # for the new adapters
    return kind(
        PPOConfig(str(folder), **arguments),
        make_word_tokenizer(),
        policy,
        train_dataset=make_prompts(prompts),
        reward_funcs=[share_of_yes],
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if model is None else None,
    )


class SeededTrainer(PPOTrainer):
    """Seeds every response by its prompt and update, so that it is the same in any process."""

    def sample(self, batch: dict[str, Any]) -> Any:
        rollouts = []
        for i, prompt in enumerate(batch["prompt"]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{self.state.global_step} {prompt}".encode()))
                rollouts.append(super().sample(_row(batch, i)))
        return _joined(rollouts)


def _row(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """One row of a batch, as a batch; a dict in it holds columns."""
    return {name: _row(v, i) if isinstance(v, dict) else v[i : i + 1] for name, v in batch.items()}


def _joined(records: list[Any]) -> Any:
    """Join rollouts of one row each, whatever their fields are."""
    values = {f.name: [getattr(r, f.name) for r in records] for f in dataclasses.fields(records[0]) if f.init}
    return type(records[0])(**{name: _joined_values(parts) for name, parts in values.items()})


def _joined_values(parts: list[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts) if parts[0].ndim else parts[0]
    if isinstance(parts[0], list):
        return [entry for part in parts for entry in part]
    if isinstance(parts[0], dict):
        return {name: _joined_values([part[name] for part in parts]) for name in parts[0]}
    return parts[0]


def run(
    folder: Path, *, rows: int, accumulation: int = 1, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Three updates with eight prompts each; this process's share is ``rows * accumulation``.

    The dataset holds exactly those eight, so each update sees the same prompts with any number of processes;
    processes and epochs may shuffle them differently.

    Args:
        resume: The checkpoint to resume from.
        options: Further options of PPOConfig.

    Returns:
        metrics, one dict per update; parameters, the trainable ones by name; start, the same before training;
        prompts, a list of this process's prompts per update; shared_out, whether the model's weights are sharded.
    """
    trainer = make_trainer(
        folder,
        prompts=8,
        kind=SeededTrainer,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        total_episodes=24,
        num_ppo_epochs=2,
        learning_rate=1e-2,
        kl_coef=0.05,
        **options,
    )
    drawn: list[list[str]] = []
    sample = trainer.sample
    trainer.sample = lambda batch: (drawn.append(list(batch["prompt"])), sample(batch))[1]
    start = trainable(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "metrics": trainer.state.log_history,
        "start": start,
        "parameters": trainable(trainer),
        "prompts": drawn,
        "shared_out": is_shared_out(trainer.model),
    }


def trainable(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.shared.named_parameters() if p.requires_grad}


def main(output: str, rows: str) -> None:
    """Run as one of several processes; each writes its results to ``output/RANK.pt``."""
    torch.set_num_threads(1)
    write_result(Path(output), run(Path(output) / "run", rows=int(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
