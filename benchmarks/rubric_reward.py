"""Rubric rewards with criteria that a program can verify: GRPO and PPO with an imperfect language model as the judge.

    python benchmarks/rubric_reward.py --output benchmarks/results/rubric_reward.md

A request such as "with fox owl without dog short" is answered with up to ten words. Its rubric: "has fox" (weight 2),
"has owl" (2), "has dog" (-2), "short" or "long" (1: at most five words, or more), "repeats" (-1: a word occurs twice).
The judge is a small language model trained on these questions about random answers, for few steps, so that it errs; its
accuracy is measured against the program, on answers of the initial and of each trained policy. The policy, a small
language model, was taught to answer, and meets some criteria by chance. TRL's own GRPOTrainer, and PPOTrainer, optimize
`RubricLabeler(judge)`. Reported over seeds: the score of answers to held-out requests, whose two wanted words never
occur together in training, by the program and by the judge, and how often each kind of criterion is met.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.special import expit
from settings import QUIET, word_tokenizer
from tables import interval
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, logging
from trl import GRPOConfig, GRPOTrainer
from trl_rlaif_rubric import RubricLabeler, grade, read_rubric

from trl_rlaif import JudgePrompt, LocalJudge, PPOConfig, PPOTrainer
from trl_rlaif.generation import sample_responses

WORDS = "fox dog cat owl bee ant elk hen cow pig rat yak".split()
LONGEST, SHORT = 10, 5
VOCABULARY = [
    "<pad>",
    "<end>",
    *WORDS,
    *"with without short long has repeats answer criterion met judge Yes No".split(),
]
INDEX = {word: i for i, word in enumerate(VOCABULARY)}
# No frames: their codes are not in this vocabulary, and no answer here imitates a prompt.
PROMPT = JudgePrompt(
    "words",
    {
        "check.txt": "judge",
        "check.jinja": "answer {{ response }} criterion {{ criterion }}",
        "check_ending.txt": "met ",
        "frame.txt": "",
    },
)
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
KINDS = {"has": "has a wanted word", "not": "has an unwanted word", "size": "is short or long", "repeats": "repeats"}


def met(criterion: str, words: list[str]) -> bool:
    """Whether the criterion is met, by the program."""
    if criterion.startswith("has "):
        return criterion.removeprefix("has ") in words
    if criterion == "repeats":
        return len(set(words)) < len(words)
    return (len(words) <= SHORT) == (criterion == "short")


def request(wanted: tuple[str, str], unwanted: str, size: str) -> dict[str, Any]:
    """A prompt with its rubric."""
    rubric = [{"criterion": f"has {word}", "weight": 2.0} for word in wanted]
    rubric += [{"criterion": f"has {unwanted}", "weight": -2.0}, {"criterion": size, "weight": 1.0}]
    rubric += [{"criterion": "repeats", "weight": -1.0}]
    return {"prompt": f"with {' '.join(wanted)} without {unwanted} {size}", "rubric": rubric}


def requests(rng: random.Random, held_out: int, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out requests; a pair of wanted words occurs in only one of the two."""
    pairs = list(itertools.combinations(WORDS, 2))
    rng.shuffle(pairs)
    apart = len(pairs) // 5

    def drawn(pairs: list[tuple[str, str]], count: int) -> list[dict[str, Any]]:
        found = []
        for _ in range(count):
            pair = rng.choice(pairs)
            unwanted = rng.choice([word for word in WORDS if word not in pair])
            found.append(request(tuple(rng.sample(pair, 2)), unwanted, rng.choice(["short", "long"])))
        return found

    return drawn(pairs[apart:], count), drawn(pairs[:apart], held_out)


def answer(rng: random.Random, asked: dict[str, Any]) -> list[str]:
    """Random words, some of them from the request."""
    named = [word for word in asked["prompt"].split() if word in WORDS]
    return [rng.choice(named if rng.random() < 0.25 else WORDS) for _ in range(rng.randint(1, LONGEST))]


def main() -> None:
    """Run all seeds; print the tables and, with ``--output``, write them."""
    args = _arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for seed in range(args.seeds):
        rng = random.Random(seed)
        train, held_out = requests(rng, args.held_out, 1024)
        policy = taught_policy(seed, train, args.policy_steps)
        judge = taught_judge(seed, train, args.judge_steps)
        for name, trained in (("start", _untrained), ("GRPO", _grpo), ("PPO", _ppo)):
            runs[name].append(measured(trained(policy, judge, train, args, seed), judge, held_out, seed))
            print(seed, name, json.dumps(runs[name][-1]), flush=True)
    lines = _table(args, runs)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--policy-steps", type=int, default=500)
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("--kl-coef", type=float, default=0.02)
    parser.add_argument("--held-out", type=int, default=96, help="requests")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


# ---- The two small models -------------------------------------------------------------------------------


def _taught(seed: int, steps: int, batch: Callable[[random.Random], list[tuple[list[int], list[int]]]]) -> Any:
    """A small Llama, trained on pairs of token id lists: a prompt and its continuation."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model, rng = LlamaForCausalLM(config), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    for _ in range(steps):
        rows = batch(rng)
        ids = pad_sequence([torch.tensor(given + wanted) for given, wanted in rows], batch_first=True)
        targets = torch.full_like(ids, -100)
        for row, (given, wanted) in zip(targets, rows, strict=True):
            row[len(given) : len(given) + len(wanted)] = torch.tensor(wanted)
        logits = model(input_ids=ids).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()).backward()
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def taught_policy(seed: int, train: list[dict[str, Any]], steps: int) -> LlamaForCausalLM:
    """A language model trained on the answers of ``answer``."""

    def batch(rng: random.Random) -> list[tuple[list[int], list[int]]]:
        asked = rng.choices(train, k=64)
        return [(_ids(one["prompt"].split()), _ids([*answer(rng, one), "<end>"])) for one in asked]

    return _taught(seed, steps, batch)


def taught_judge(seed: int, train: list[dict[str, Any]], steps: int) -> LocalJudge:
    """A judge trained on random answers with the program's verdicts."""
    tokenizer = word_tokenizer(INDEX)

    def batch(rng: random.Random) -> list[tuple[list[int], list[int]]]:
        rows = []
        for asked in rng.choices(train, k=64):
            words, one = answer(rng, asked), rng.choice(asked["rubric"])["criterion"]
            question = PROMPT.check(asked["prompt"], " ".join(words), one)
            text = f"{question.messages[0]['content']} {question.ending}"
            rows.append((tokenizer(text)["input_ids"], _ids(["Yes" if met(one, words) else "No"])))
        return rows

    return LocalJudge(_taught(1000 + seed, steps, batch), tokenizer, PROMPT, "small judge")


def _ids(words: list[str]) -> list[int]:
    return [INDEX[word] for word in words]


# ---- Training -------------------------------------------------------------------------------------------


def _untrained(policy: LlamaForCausalLM, *_: Any) -> LlamaForCausalLM:
    return policy


def _grpo(
    policy: LlamaForCausalLM, judge: LocalJudge, train: list[dict[str, Any]], args: argparse.Namespace, seed: int
) -> LlamaForCausalLM:
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=copy.deepcopy(policy),
            reward_funcs=[RubricLabeler(judge)],
            args=GRPOConfig(
                folder, seed=seed, max_steps=args.updates, per_device_train_batch_size=64, num_generations=8,
                max_completion_length=LONGEST + 1, temperature=1.0, learning_rate=1e-3, beta=args.kl_coef,
                lr_scheduler_type="constant", logging_steps=10, **QUIET,
            ),
            train_dataset=Dataset.from_list(train),
            processing_class=word_tokenizer(INDEX),
            peft_config=LORA,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.merge_and_unload().eval()


def _ppo(
    policy: LlamaForCausalLM, judge: LocalJudge, train: list[dict[str, Any]], args: argparse.Namespace, seed: int
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                folder, seed=seed, per_device_train_batch_size=64, total_episodes=64 * args.updates, num_ppo_epochs=4,
                learning_rate=1e-3, lr_scheduler_type="constant", kl_coef=args.kl_coef, response_length=LONGEST + 1,
                stop_token="eos", temperature=1.0, num_sample_generations=0, logging_steps=10, **QUIET,
            ),
            word_tokenizer(INDEX),
            copy.deepcopy(policy),
            reward_funcs=[RubricLabeler(judge)],
            train_dataset=Dataset.from_list(train),
            peft_config=LORA,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.shared.peft.merge_and_unload(adapter_names=["policy"]).eval()


# ---- Measurement ----------------------------------------------------------------------------------------


def measured(policy: LlamaForCausalLM, judge: LocalJudge, held_out: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Scores of answers to held-out requests by the program and by the judge, and their agreement."""
    torch.manual_seed(3000 + seed)
    tokenizer = word_tokenizer(INDEX)
    ids = [_ids(asked["prompt"].split()) for asked in held_out]
    drawn = sample_responses(policy, tokenizer, ids, num_responses=4, max_new_tokens=LONGEST + 1, temperature=1.0)
    rows = [(a, [VOCABULARY[i] for i in r]) for a, rs in zip(held_out, drawn, strict=True) for r in rs]
    rubrics = [read_rubric(asked["rubric"]) for asked, _ in rows]
    truths = [[met(one.text, words) for one in rubric] for rubric, (_, words) in zip(rubrics, rows, strict=True)]
    groups = [
        [PROMPT.check(asked["prompt"], " ".join(words), one.text) for one in rubric]
        for rubric, (asked, words) in zip(rubrics, rows, strict=True)
    ]
    answers = dict(judge.ask(groups, ("Yes", "No")))
    said = [[float(expit(yes - no)) for a in answers[i] for yes, no in a.logprobs] for i in range(len(rows))]
    pairs: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for of in zip(truths, said, strict=True):
        for kind, *pair in zip(("has", "has", "not", "size", "repeats"), *of, strict=True):
            pairs[kind].append(tuple(pair))
    return {
        "program": fmean(grade(r, t).mean for r, t in zip(rubrics, truths, strict=True)),
        "judge": fmean(grade(r, s).mean for r, s in zip(rubrics, said, strict=True)),
        "words": fmean(len(words) for _, words in rows),
        "met": {k: fmean(t for t, _ in of) for k, of in pairs.items()},
        "said": {k: fmean(s for _, s in of) for k, of in pairs.items()},
        "accuracy": {k: fmean((s > 0.5) == t for t, s in of) for k, of in pairs.items()},
    }


def _table(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl-rlaif"))
    lines = [
        f"<!-- python benchmarks/rubric_reward.py --seeds {args.seeds} --updates {args.updates} --policy-steps "
        f"{args.policy_steps} --judge-steps {args.judge_steps} --kl-coef {args.kl_coef:g} -->",
        "",
        f"{versions}; mean over {args.seeds} seeds and 95% interval; {args.held_out} held-out requests with 4 answers.",
        "",
        "| policy | score by the program | gain | score by the judge | gain | words |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in runs.items():
        cells = []
        for key in ("program", "judge"):
            gains = [run[key] - start[key] for run, start in zip(of, runs["start"], strict=True)]
            cells += [interval([run[key] for run in of], 3), "" if name == "start" else interval(gains, 3)]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval([run['words'] for run in of], 1)} |")
    lines += ["", "Share of answers that meet a criterion, by the program (by the judge; its accuracy):", ""]
    lines += ["| criterion | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    for kind, text in KINDS.items():
        cells = [
            f"{interval([run['met'][kind] for run in of], 2)} ({fmean(run['said'][kind] for run in of):.2f}; "
            f"{fmean(run['accuracy'][kind] for run in of):.0%})"
            for of in runs.values()
        ]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
