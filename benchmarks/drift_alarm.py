"""False alarms of the regulator's drift test, and its delay in detecting a planted drift.

    python benchmarks/drift_alarm.py --output benchmarks/results/drift_alarm.md

A run has 200 updates of 32 responses to prompts of 10 categories with different means. The KL is always above its
budget, so the scores alone decide. In stationary runs any alarm in any category is false; in the others, the scores of
one category rise linearly over the whole run, or at once after a quarter of it, and the first alarm in that category
counts. Intervals are exact (Clopper and Pearson 1934), 95%.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import binomtest
from trl_rlaif_regulator import DistributionRegulator

CATEGORIES, RESPONSES, UPDATES = 10, 32, 200
# (size,) scores of variance 1.
SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda g, size: g.standard_normal(size),
    "t, 5 degrees of freedom": lambda g, size: g.standard_t(5, size) / np.sqrt(5 / 3),
    "exponential": lambda g, size: g.exponential(size=size),
    "right in 20% of cases": lambda g, size: (g.random(size) < 0.2) / 0.4,
}


def main() -> None:
    """Run all cases; print the table and, with ``--output``, write it."""
    args = _arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    lines = [
        f"<!-- python benchmarks/drift_alarm.py --runs {args.runs} -->",
        "",
        f"{CATEGORIES} categories, {UPDATES} updates of {RESPONSES} responses, {args.runs} runs each",
        "",
        "| scores | drift | runs with an alarm | interval | updates until then, median |",
        "|---|---|---|---|---|",
    ]
    cases = [(shape, 1, "none", 0.0) for shape in SHAPES] + [("normal", 8, "none", 0.0)]
    cases += [("normal", 1, "in a line", size) for size in (0.5, 1.0, 2.0)]
    cases += [("t, 5 degrees of freedom", 1, "in a line", 1.0), ("normal", 8, "in a line", 2.0)]
    cases += [("normal", 1, "at once", size) for size in (0.5, 1.0)]
    for shape, group, kind, size in cases:
        began = time.monotonic()
        first = [_first_alarm(seed, shape, group, kind, size) for seed in range(args.runs)]
        alarms = [update for update in first if update is not None]
        ends = binomtest(len(alarms), len(first)).proportion_ci()
        lines.append(
            f"| {shape}{f', {group} responses to a prompt' if group > 1 else ''} | "
            f"{f'{size:g} std, {kind}' if size else kind} | {len(alarms)} | {ends.low:.1%} to {ends.high:.1%} | "
            f"{f'{np.median(alarms):.0f}' if alarms and size else ''} |"
        )
        print(lines[-1], f"{time.monotonic() - began:.0f} s", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_alarm(seed: int, shape: str, group: int, kind: str, size: float) -> int | None:
    """The first update, counted from 1, with an alarm; if there is a drift, with one in its category."""
    generator = np.random.default_rng(seed)
    regulator = DistributionRegulator(warm_up=UPDATES)  # pooled statistics are faster, and alarms are the same
    for update in range(UPDATES):
        kinds = generator.integers(0, CATEGORIES, RESPONSES // group).repeat(group)
        scores = SHAPES[shape](generator, RESPONSES) + kinds
        if group > 1:  # the prompt accounts for half of the score's variance
            scores = (scores - kinds + generator.standard_normal(RESPONSES // group).repeat(group)) / 2**0.5 + kinds
        rise = size * (update / (UPDATES - 1) if kind == "in a line" else update >= UPDATES // 4)
        scores = scores + np.where(kinds == 0, rise, 0.0)
        regulator.transform(torch.tensor(scores, dtype=torch.float32), _batch(kinds, group))
        alarms = regulator.metrics()
        watched = range(CATEGORIES) if not size else [0]
        if any(alarms.get(f"regulator/c{i}/drift") for i in watched):
            return update + 1
    return None


def _batch(kinds: np.ndarray, group: int) -> SimpleNamespace:
    """The parts of a batch that the regulator reads, with a KL of 20 nats per response."""
    return SimpleNamespace(
        prompts=[f"prompt {i // group}" for i in range(len(kinds))],
        categories=[f"c{kind}" for kind in kinds],
        kl=torch.full((len(kinds),), 20.0),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
