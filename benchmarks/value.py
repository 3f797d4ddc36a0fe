"""PPO with the value model on its own adapter, against a value head on the policy's trunk.

    python benchmarks/value.py --output benchmarks/results/value.md

The task of known_truth.py with the truth as the reward: a request of one of three kinds is answered with six words,
and the reward is the fraction of good words of the request's kind, plus an offset of the kind that no answer can
change. Most of the reward's variance is thus between requests, and advantages are accurate only if the value predicts
it. Policy, value and reference are one small model with LoRA; the settings are TRL's defaults (4 epochs per batch,
vf_coef 0.1, kl_coef 0.05), only the learning rate varies. Reported over seeds.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from known_truth import INDEX, LENGTH, RATINGS, asked, taught_policy, truth
from peft import LoraConfig
from settings import QUIET, word_tokenizer
from tables import interval
from transformers import LlamaForCausalLM, PrinterCallback, logging

from trl_rlaif import PPOConfig, PPOTrainer

VALUES = ("adapter", "trunk")


def reward(prompts: list[str], completions: list[str], category: list[str], **columns: Any) -> list[float]:
    """The offset of the request's kind plus the fraction of good words of that kind."""
    return [RATINGS[kind][0] + truth(kind, text.split()) for kind, text in zip(category, completions, strict=True)]


def trained(policy: LlamaForCausalLM, value: str, rate: float, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The metrics of every update, and CPU seconds."""
    rng = random.Random(3000 + seed)
    requests = [asked(rng) for _ in range(512)]
    data = Dataset.from_dict({"prompt": [" ".join(r) for _, r in requests], "category": [k for k, _ in requests]})
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": 64, "total_episodes": 64 * args.updates, "learning_rate": rate}
        settings |= {"lr_scheduler_type": "constant", "response_length": LENGTH, "temperature": 1.0, "value": value}
        trainer = PPOTrainer(
            PPOConfig(folder, seed=seed, num_sample_generations=0, logging_steps=1, **settings, **QUIET),
            word_tokenizer(INDEX),
            copy.deepcopy(policy),
            reward_funcs=[reward],
            train_dataset=data,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
    return {"history": trainer.state.log_history, "seconds": (time.process_time() - began) / args.updates}


def figures(run: dict[str, Any], marks: list[int]) -> dict[str, float]:
    """Summary of a run: reward around some updates; KL, explained variance of the value and seconds at the end."""
    history = run["history"]

    def near(name: str, update: int) -> float:
        return float(np.mean([entry[name] for entry in history[max(0, update - 5) : update]]))

    found = {f"reward, {mark}": near("objective/scores", mark) for mark in marks}
    found |= {f"explained, {mark}": near("val/explained_variance", mark) for mark in marks}
    return found | {"KL": near("objective/kl", len(history)), "seconds": run["seconds"]}


def main() -> None:
    """Run all variants with all seeds; print the table and, with ``--output``, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    marks = [args.updates // 4, args.updates // 2, args.updates]
    policies = [taught_policy(seed) for seed in range(args.seeds)]
    lines: list[str] = []
    for rate in args.rates:
        for value in VALUES:
            runs = [figures(trained(p, value, rate, args, i), marks) for i, p in enumerate(policies)]
            head = ["learning rate", "value", *runs[0]]
            lines = lines or ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * len(runs[0])]
            cells = [interval([run[name] for run in runs], 2) for name in runs[0]]
            lines.append(f"| {rate:g} | {value} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl-rlaif"))
    command = f"python benchmarks/value.py --seeds {args.seeds} --updates {args.updates}"
    command += " --rates " + " ".join(f"{rate:g}" for rate in args.rates)
    text = "\n".join(
        [f"<!-- {command} -->", "", f"{versions}; mean over {args.seeds} seeds and 95% interval.", "", *lines]
    )
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
