"""RLAIF against RLHF against SFT with known truth.

    python benchmarks/papers/rlaif_known_truth.py --output benchmarks/results/rlaif_known_truth.md

Lee et al. 2023, section 4.1, on the task of known_truth.py. Humans compare few pairs of answers. RLHF: a reward model
learns from these alone. Distilled RLAIF: a judge, pretrained on absolute ratings and taught the same pairs, gives many
pairs soft labels, from which another reward model learns. Direct RLAIF: the judge's score is the reward. PPO optimizes
each; the true reward decides. For comparison, RLHF with as many human-labeled pairs as the judge labels, and a judge
without human comparisons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from claims import arguments, made_with, parsed, stored, verdict, write
from known_truth import (
    comparisons,
    fresh_scorer,
    labeled,
    learned,
    ppo,
    preferences,
    probabilities,
    rated_scorer,
    taught_policy,
)
from tables import interval
from transformers import logging

from trl_rlaif.evaluation import outcome_calibration_error
from trl_rlaif.report.plots import Panel, curves

ARMS = ("RLHF, few pairs", "distilled RLAIF", "direct RLAIF", "distilled RLAIF, untaught judge", "RLHF, many pairs")
HELD_OUT = 1000
# With this few steps, the judge is right on about three quarters of comparisons, like the paper's on human choices.
JUDGE_STEPS = 20


def main() -> None:
    """Measure all variants with all seeds; write the page after each."""
    parser = arguments(__doc__, "rlaif_known_truth", seeds=5)
    parser.add_argument("--people", type=int, default=200, help="comparisons that people make")
    parser.add_argument("--labeled", type=int, default=2000, help="comparisons that the judge labels")
    parser.add_argument("--updates", type=int, default=60)
    args = parsed(parser)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for seed in range(args.seeds):
        start: dict[str, Any] = {}
        found.append({arm: stored(args.runs, f"{seed}-{arm}", _measure, args, seed, arm, start) for arm in ARMS})
    _page(args, found)


def _measure(args: Any, seed: int, arm: str, start: dict[str, Any]) -> dict[str, Any]:
    few, many = comparisons(2000 + seed, args.people), comparisons(5000 + seed, args.labeled)
    # The same number of steps for few pairs as for many: only the data differ, not the training time.
    epochs = 4 * args.labeled // args.people
    if not start:
        start |= {"policy": taught_policy(seed), "rated": rated_scorer(seed, JUDGE_STEPS)}
        start["judge"] = learned(start["rated"], preferences(few, seed), seed)
    if arm == "RLHF, few pairs":
        scorer = learned(fresh_scorer(seed), preferences(few, seed), seed, epochs=epochs)
    elif arm == "RLHF, many pairs":
        scorer = learned(fresh_scorer(seed), preferences(many, seed), seed)
    elif arm == "direct RLAIF":
        scorer = start["judge"]
    else:
        judge = start["rated" if "untaught" in arm else "judge"]
        scorer = learned(fresh_scorer(seed), labeled(many, judge), seed)
    held_out = comparisons(4000 + seed, HELD_OUT)
    p, people = probabilities(held_out, scorer), [c.p for c in held_out]
    right = np.mean([(a > 0.5) == (b > 0.5) for a, b in zip(p, people, strict=True) if b != 0.5])
    run = ppo(start["policy"], scorer, seed, updates=args.updates)
    return {"accuracy": float(right), "ece": outcome_calibration_error(p, people), "run": run}


def _page(args: Any, found: list[dict[str, Any]]) -> None:
    def each(arm: str, key: str) -> np.ndarray:
        if key in ("accuracy", "ece"):
            return np.array([seed[arm][key] for seed in found])
        runs = [[entry["truth"] for entry in seed[arm]["run"]] for seed in found]
        return np.array([{"start": run[0], "last": np.mean(run[-5:]), "mean": np.mean(run)}[key] for run in runs])

    rlhf, many = "RLHF, few pairs", "RLHF, many pairs"
    distilled, direct = "distilled RLAIF", "direct RLAIF"
    verdicts = [
        *(verdict(f"{arm} ends above SFT", each(arm, "last") - each(arm, "start"))
          for arm in (rlhf, distilled, direct)),
        *(verdict(f"{arm} ends where RLHF does, within 0.05", each(arm, "last") - each(rlhf, "last"), within=0.05)
          for arm in (distilled, direct)),
        verdict("distilled RLAIF ends where RLHF with many pairs does, within 0.05",
                each(distilled, "last") - each(many, "last"), within=0.05),
        verdict("direct RLAIF ends above distilled RLAIF", each(direct, "last") - each(distilled, "last")),
        verdict("people's pairs make the judge better", each(distilled, "last") - each(ARMS[3], "last")),
    ]  # fmt: skip
    keys = {"accuracy": "accuracy of the reward", "ece": "ECE", "start": "true reward at the start",
            "last": "at the end", "mean": "mean over the run"}  # fmt: skip
    lines = [f"| reward | {' | '.join(keys.values())} |", "|---" * (1 + len(keys)) + "|"]
    lines += [f"| {arm} | " + " | ".join(interval(each(arm, key), 3) for key in keys) + " |" for arm in ARMS]
    ways = []
    for arm in ARMS:
        updates = zip(*(seed[arm]["run"] for seed in found), strict=True)
        ways.append((arm, [(step, float(np.mean([e["truth"] for e in of]))) for step, of in enumerate(updates, 1)]))
    head = (
        f"{made_with()}; {len(found)} seeds, means and 95% intervals. People compare {args.people:,} pairs of answers, "
        f"or {args.labeled:,} ('many'), which the judge labels. The true reward is from 0 to 1."
    )
    figure = curves([Panel("", ways)], "True reward in PPO")
    write(args, head, lines, verdicts, {"True reward by update of PPO": figure})


if __name__ == "__main__":
    main()
