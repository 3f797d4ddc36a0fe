"""The Advantage Model with known truth: calibration, and reward hacking by PPO, against plain and centered models.

    python benchmarks/papers/reward_hacking.py --output benchmarks/results/reward_hacking.md

Peng et al. 2023, sections 3.1 and 3.2. From the same initialization and comparisons (known_truth.py), reward models are
trained as usual, with TRL's `center_rewards_coefficient`, and as an Advantage Model at each margin (the paper's is 2.5,
this project's default 4). Calibration is measured against the known preference probabilities, on held-out comparisons.
PPO then optimizes each model, with and without the distribution regulator.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from claims import arguments, made_with, parsed, stored, verdict, write
from known_truth import comparisons, learned, ppo, preferences, probabilities, rated_scorer, taught_policy
from tables import interval
from transformers import logging
from trl_rlaif_advantage import AdvantageModel
from trl_rlaif_regulator import DistributionRegulator

from trl_rlaif.evaluation import outcome_calibration_error
from trl_rlaif.report.plots import Panel, curves

MARGINS = (1.0, 2.5, 4.0)
MODELS: dict[str, dict[str, float]] = {
    "plain": {}, "centred": {"centre": 0.01}, **{f"advantage, m = {m:g}": {"margin": m} for m in MARGINS}
}  # fmt: skip
LEVELS = (0, 1, 2, 4, 6, 8, 12)
HELD_OUT = 1000


def main() -> None:
    """Measure all models with all seeds; write the page after each."""
    parser = arguments(__doc__, "reward_hacking", seeds=5)
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--kl-coef", type=float, default=0.05, help="TRL's default")
    args = parsed(parser)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for seed in range(args.seeds):
        start: dict[str, Any] = {}
        found.append({n: stored(args.runs, f"{seed}-{n}", _measure, args, seed, MODELS[n], start) for n in MODELS})
    _page(args, found)


def _measure(args: Any, seed: int, model: dict[str, float], start: dict[str, Any]) -> dict[str, Any]:
    """A reward model's calibration, and PPO on it, alone and regulated."""
    if not start:
        start |= {"policy": taught_policy(seed), "scorer": rated_scorer(seed)}
    transforms = [AdvantageModel(margin=model["margin"])] if "margin" in model else []
    rows = preferences(comparisons(2000 + seed, args.comparisons), seed)
    scorer = learned(start["scorer"], rows, seed, transforms=transforms, centre=model.get("centre"))
    held_out = comparisons(4000 + seed, HELD_OUT)
    p, people = probabilities(held_out, scorer), [c.p for c in held_out]
    runs = {}
    for name, regulated in (("alone", []), ("regulated", [DistributionRegulator()])):
        used = [*copy.deepcopy(transforms), *regulated]
        runs[name] = ppo(start["policy"], scorer, seed, updates=args.updates, transforms=used, kl_coef=args.kl_coef)
    right = np.mean([(a > 0.5) == (b > 0.5) for a, b in zip(p, people, strict=True) if b != 0.5])
    return {"ece": outcome_calibration_error(p, people), "accuracy": float(right), "runs": runs}


def _summary(run: list[dict[str, float]]) -> dict[str, float]:
    smooth = {key: np.convolve([entry[key] for entry in run], np.ones(5) / 5, "valid") for key in run[0]}
    best = int(smooth["truth"].argmax())
    return {
        "start": run[0]["truth"],
        "best": float(smooth["truth"][best]),
        "last": float(smooth["truth"][-1]),
        "lost": float(smooth["truth"][best] - smooth["truth"][-1]),
        "kl": float(smooth["kl"][-1]),
        "other kinds' words": float(smooth["other_kind"][-1]),
    }


def _page(args: Any, found: list[dict[str, Any]]) -> None:
    def each(name: str, key: str, how: str = "alone") -> np.ndarray:
        if key in ("ece", "accuracy"):
            return np.array([seed[name][key] for seed in found])
        return np.array([_summary(seed[name]["runs"][how])[key] for seed in found])

    paper, default = "advantage, m = 2.5", "advantage, m = 4"
    verdicts = []
    for name in (paper, default):
        last, lost = each(name, "last"), each(name, "lost")
        verdicts += [
            *(verdict(f"{name}: lower ECE than {other}", each(other, "ece") - each(name, "ece"))
              for other in ("plain", "centred")),
            verdict(f"{name}: PPO ends with more true reward than on plain", last - each("plain", "last")),
            *(verdict(f"{name}: less of the best true reward is lost than on {other}", each(other, "lost") - lost)
              for other in ("plain", "centred")),
            verdict(f"{name}: the regulator adds true reward", each(name, "last", "regulated") - last),
        ]  # fmt: skip
    verdicts.append(
        verdict("plain: the regulator adds true reward", each("plain", "last", "regulated") - each("plain", "last"))
    )
    lines = ["| reward model | accuracy | ECE |", "|---|---|---|"]
    lines += [f"| {n} | {interval(each(n, 'accuracy'), 3)} | {interval(each(n, 'ece'), 3)} |" for n in MODELS]
    keys = list(_summary(found[0]["plain"]["runs"]["alone"]))
    lines += ["", f"True reward in PPO of {args.updates} updates, means of five; KL in nats per response:", ""]
    lines += [f"| reward | {' | '.join(keys)} |", "|---" * (1 + len(keys)) + "|"]
    names = [(name, how) for name in MODELS for how in ("alone", "regulated")]
    for name, how in names:
        title = name if how == "alone" else f"{name}, regulated"
        lines.append(f"| {title} | " + " | ".join(interval(each(name, key, how), 2) for key in keys) + " |")
    lines += ["", "True reward at a KL of about:", "", f"| reward | {' | '.join(map(str, LEVELS))} |"]
    lines.append("|---" * (1 + len(LEVELS)) + "|")
    ways = {}
    for name, how in names:
        title = name if how == "alone" else f"{name}, regulated"
        points = [(entry["kl"], entry["truth"]) for seed in found for entry in seed[name]["runs"][how]]
        near = [[true for kl, true in points if abs(kl - level) <= max(0.5, level / 8)] for level in LEVELS]
        lines.append(f"| {title} | " + " | ".join(f"{np.mean(n):.2f}" if n else "" for n in near) + " |")
        updates = zip(*(seed[name]["runs"][how] for seed in found), strict=True)
        ways[title] = [(step, float(np.mean([e["truth"] for e in entries]))) for step, entries in enumerate(updates, 1)]
    shown = [(title, ways[title]) for title in ("plain", "centred", paper, default, "plain, regulated")]
    head = f"{made_with()}; {len(found)} seeds, means and 95% intervals. {args.comparisons:,} comparisons each."
    figure = curves([Panel("", shown)], "True reward in PPO")
    write(args, head, lines, verdicts, {"True reward by update of PPO": figure})


if __name__ == "__main__":
    main()
