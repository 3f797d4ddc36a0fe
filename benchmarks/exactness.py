"""Exactness: each formula of the two papers against an independent float64 value.

    python benchmarks/exactness.py --output docs/correctness.md

Tiny models with random weights, in float32 on the CPU, go through the same code as a user's. Each expected value is
computed in float64 from the formula: one sequence at a time, without padding, packing, cache, adapters or autograd
functions of the project. It takes about a minute.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import exact_models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import binomtest  # noqa: E402
from trl_rlaif_direct.rating import rating  # noqa: E402
from trl_rlaif_distilled.debias import combine, mean_preference  # noqa: E402
from trl_rlaif_rehearsal.rejection import RejectionSampling  # noqa: E402
from trl_rlaif_rehearsal.selective import SelectiveRehearsal  # noqa: E402

from trl_rlaif.evaluation import (  # noqa: E402
    agreement,
    calibration_error,
    outcome_calibration_error,
    pairwise_accuracy,
    position_bias,
    wilson,
)
from trl_rlaif.rl.reward_shaping import kl_per_token, token_rewards  # noqa: E402
from trl_rlaif.types import Pool  # noqa: E402

RLAIF, PENG = "Lee et al. 2023", "Peng et al. 2023"


@dataclass(frozen=True)
class Check:
    """A formula, its source, and the function that computes the largest difference from it.

    Args:
        formula: In LaTeX-free notation.
        source: Paper and section.
        code: The public API that computes it.
        unit: Unit of the difference; ``count`` is a number of wrong choices.
        limit: Largest difference explained by float32 arithmetic.
        difference: Returns the largest absolute difference, or the largest one relative to the largest value.
    """

    formula: str
    source: str
    code: str
    unit: str
    limit: float
    difference: Callable[[], float]


CHECKS: list[Check] = []


def check(formula: str, source: str, code: str, unit: str, limit: float) -> Callable[[Callable], Callable]:
    """Register a check."""

    def registered(function: Callable[[], float]) -> Callable[[], float]:
        CHECKS.append(Check(formula, source, code, unit, limit, function))
        return function

    return registered


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def uniform(count: int, low: float, high: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.uniform(low, high) for _ in range(count)]


# ---- Labels ---------------------------------------------------------------------------------------------------


@check("p = softmax(log P(1), log P(2)) in both orders, and the mass P(1) + P(2)", f"{RLAIF}, 2.1", "labeler distilled",
       "probability", 1e-5)  # fmt: skip
def distilled() -> float:
    return exact_models.distilled_difference()


@check(
    "p = (p_12 + p_21) / 2 (mean_prob)", f"{RLAIF}, 2.1", "labeler distilled, debias: mean_prob", "probability", 1e-12
)
def mean_prob() -> float:
    pairs = zip(uniform(200, -8, 8, 1), uniform(200, -8, 8, 2), strict=True)
    return max(abs(combine([a, b], "mean_prob") - (sigmoid(a) + sigmoid(b)) / 2) for a, b in pairs)


@check("p = s((l_12 + l_21) / 2), l the log-odds of response 1 (mean_logit)", "this project",
       "labeler distilled, debias: mean_logit", "probability", 1e-12)  # fmt: skip
def mean_logit() -> float:
    pairs = zip(uniform(200, -8, 8, 3), uniform(200, -8, 8, 4), strict=True)
    return max(abs(combine([a, b], "mean_logit") - sigmoid((a + b) / 2)) for a, b in pairs)


@check("mean over rationales of softmax(log P(1), log P(2)) (self-consistency)", f"{RLAIF}, 2.1",
       "labeler distilled, rationales: n", "probability", 1e-12)  # fmt: skip
def self_consistency() -> float:
    largest = 0.0
    for seed in range(50):
        draws = list(zip(uniform(8, -9, -1, seed), uniform(8, -9, -1, seed + 100), strict=True))
        expected = sum(math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in draws) / 8
        largest = max(largest, abs(mean_preference("12", draws).p - expected))
    return largest


@check("r = 2 (s - 1) / 9 - 1, s = sum i P(i) / sum P(i), P(1) without P(10)", f"{RLAIF}, 2.2.2", "labeler direct",
       "reward", 1e-5)  # fmt: skip
def direct() -> float:
    return exact_models.direct_difference()


@check("the same, from ten given log-probabilities", f"{RLAIF}, 2.2.2", "labeler direct", "reward", 1e-12)
def expected_rating() -> float:
    largest = 0.0
    for seed in range(100):
        logprobs = uniform(10, -30, 0, seed)
        weights = np.exp(logprobs) / np.exp(logprobs).sum()
        expected = 2 * (np.arange(1, 11) @ weights - 1) / 9 - 1
        largest = max(largest, abs(rating([logprobs]).reward - expected))
    return largest


# ---- Reward model ---------------------------------------------------------------------------------------------


@check("L = -[p log s(r_1 - r_2) + (1 - p) log s(r_2 - r_1)] and its gradient in all weights", f"{RLAIF}, 3.1",
       "RewardTrainer with a column p", "relative", 1e-4)  # fmt: skip
def soft_labels() -> float:
    return exact_models.reward_difference(advantage=False)


@check("a = r - ((N-1)/N) e - (1/N) sum_k (pi / pi'_k) r; three-term loss with margin m; gradients",
       f"{PENG}, Advantage Model",
       "RewardTrainer with the transform advantage", "relative", 1e-4)  # fmt: skip
def advantage_model() -> float:
    return exact_models.reward_difference(advantage=True)


@check("scores of each category at mean 0 and the overall standard deviation: (r - mean) / std before clipping",
       f"{PENG}, distribution regulator (at RL time: this project)", "transform distribution_regulator", "reward",
       1e-3)  # fmt: skip
def regulator() -> float:
    return exact_models.regulator_difference()


@check("log pi(y|x) - log pi'(y|x) of whole responses", f"{PENG}, Advantage Model", "add_log_ratios", "nats", 1e-4)
def log_ratios() -> float:
    return exact_models.log_ratio_difference()


# ---- RL -------------------------------------------------------------------------------------------------------


@check("log pi(y_t | x, y_<t) / T of policy and reference, and values, of sampled responses", RLAIF,
       "PPOTrainer.sample", "nats", 1e-4)  # fmt: skip
def rollout() -> float:
    return exact_models.ppo_differences()["rollout"]


@check("(1 - beta) r - beta KL at the last token, -beta KL at the others", RLAIF,
       "PPOConfig(kl_weighting='weighted')", "reward", 1e-6)  # fmt: skip
def objective() -> float:
    torch.manual_seed(0)
    logprobs, reference, scores = torch.randn(4, 6) - 2, torch.randn(4, 6) - 2, torch.randn(4)
    lengths, beta = torch.tensor([6, 3, 1, 5]), 0.05
    inside = torch.arange(6) < lengths[:, None]
    logprobs, reference = logprobs * inside, reference * inside
    found = token_rewards(kl_per_token(logprobs, reference, "k1"), (1 - beta) * scores, lengths, beta).sum(1)
    expected = [
        (1 - beta) * scores[i].item() - beta * (logprobs[i, :n].double() - reference[i, :n].double()).sum().item()
        for i, n in enumerate(lengths.tolist())
    ]  # fmt: skip
    return (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()


@check("GAE, whitened advantages, clipped policy and value losses over a whole minibatch, and their gradient in every "
       "weight of policy and value", "Schulman et al. 2016, eq. 16; 2017, eq. 7 and 9", "PPOTrainer", "relative",
       1e-3)  # fmt: skip
def ppo_gradient() -> float:
    return exact_models.ppo_differences()["gradient"]


@check("L_PPO + gamma L_NLL(D_R), its gradient in every weight of the policy", f"{PENG}, Selective Rehearsal",
       "PPOTrainer(rehearsal_dataset=...)", "relative", 1e-3)  # fmt: skip
def rehearsal_gradient() -> float:
    return exact_models.ppo_differences(rehearsal=True)["gradient"]


# ---- Selection ------------------------------------------------------------------------------------------------


def _pool() -> Pool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(60).repeat_interleave(4)
    embeddings = np.random.default_rng(0).normal(size=(240, 8)) + 6 * np.eye(8)[np.arange(240) // 4 % 4]
    return Pool(
        prompts=[f"prompt {i}" for i in rows.tolist()],
        responses=[f"response {i}" for i in range(240)],
        scores=torch.randn(240, generator=generator),
        categories=[None] * 240,
        rows=rows,
        prompt_ids=[[i] for i in rows.tolist()],
        response_ids=[[i, i] for i in range(240)],
        embed=lambda: embeddings.astype(np.float32),
    )


@check("the k pairs with the highest a(x, y) in each of c clusters", f"{PENG}, Selective Rehearsal",
       "selector selective_rehearsal", "count", 0)  # fmt: skip
def best_of_clusters() -> float:
    pool = _pool()
    options = {"clusters": 4, "per_cluster": 5, "duplicates": 1.0}
    found = SelectiveRehearsal(**options).select(pool)
    expected = set()
    for cluster in set(found.clusters):
        members = sorted((i for i in range(240) if found.clusters[i] == cluster), key=lambda i: -pool.scores[i].item())
        of_row: dict[int, int] = {}
        for i in members:  # a prompt is rehearsed once, with its best response
            of_row.setdefault(int(pool.rows[i]), i)
        expected |= set(sorted(of_row.values(), key=lambda i: -pool.scores[i].item())[:5])
    return len(expected ^ {pair.response_ids[0] for pair in found.rehearsal})


@check("D = {(x, y): r(x, y) >= tau}; the best response to each prompt", "Dong et al. 2023; Gulcehre et al. 2023",
       "selector rejection_sampling", "count", 0)  # fmt: skip
def rejection() -> float:
    pool, tau = _pool(), 0.5
    above = RejectionSampling(keep="above", threshold=tau, num_responses=4).select(pool)
    best = RejectionSampling(keep="best", num_responses=4).select(pool)
    scores = pool.scores.double()
    expected = {i for i in range(240) if scores[i] >= tau}
    wrong = expected ^ {pair.response_ids[0] for pair in above.rehearsal}
    expected = set((scores.view(60, 4).argmax(1) + 4 * torch.arange(60)).tolist())
    return len(wrong) + len(expected ^ {pair.response_ids[0] for pair in best.rehearsal})


# ---- Metrics --------------------------------------------------------------------------------------------------


@check("AI labeler alignment, position bias, ranking accuracy", f"{RLAIF}, 3.3 and 2.1",
       "results.json: label.agreement, label.position_bias, reward.accuracy", "share", 1e-12)  # fmt: skip
def shares() -> float:
    p, other = uniform(300, 0, 1, 5), uniform(300, 0, 1, 6)
    human = [random.Random(7 + i).choice([1, 2]) for i in range(300)]
    agree = np.mean((np.array(p) > 0.5) == (np.array(human) == 1))
    biased = np.mean((np.array(p) > 0.5) != (np.array(other) > 0.5))
    ranked = np.mean(np.array(p) > np.array(other))
    found = agreement(p, human)["rate"], position_bias(p, other)["rate"], pairwise_accuracy(p, other)["rate"]
    return float(np.abs(np.array(found) - (agree, biased, ranked)).max())


@check(
    "ECE = sum_b n_b / n |outcomes - confidence|", "Guo et al. 2017, eq. 3", "results.json: label.ece", "share", 1e-12
)
def ece() -> float:
    p = uniform(500, 0, 1, 8)
    human = [1 if random.Random(i).random() < x else 2 for i, x in enumerate(p)]
    table = np.array([(max(x, 1 - x), (x > 0.5) == (h == 1)) for x, h in zip(p, human, strict=True)])
    bins = np.digitize(table[:, 0], np.linspace(0.5, 1, 11)[1:-1])
    expected = sum(
        np.mean(bins == b) * abs(table[bins == b, 1].mean() - table[bins == b, 0].mean()) for b in set(bins.tolist())
    )
    return abs(calibration_error(p, human) - expected)


@check("ECE = sum_b n_b / n |mean of p - mean of s(r_1 - r_2)| against soft labels p", "Guo et al. 2017, eq. 3",
       "results.json: reward.ece", "share", 1e-12)  # fmt: skip
def soft_ece() -> float:
    p, found = np.array(uniform(500, 0, 1, 9)), np.array(uniform(500, 0, 1, 10))
    confidence = np.maximum(found, 1 - found)
    outcome = np.where(found > 0.5, p, 1 - p)
    bins = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1])
    expected = sum(
        np.mean(bins == b) * abs(outcome[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins.tolist())
    )
    return abs(outcome_calibration_error(found.tolist(), p.tolist()) - expected)


@check("Wilson score interval", "Wilson 1927", "the interval of every proportion", "share", 1e-12)
def intervals() -> float:
    largest = 0.0
    for n in (1, 7, 40, 200):
        for hits in range(n + 1):
            expected = binomtest(hits, n).proportion_ci(method="wilson")
            largest = max(largest, *np.abs(np.subtract(wilson(hits, n), (expected.low, expected.high))))
    return float(largest)


# ---- Table ----------------------------------------------------------------------------------------------------


def table(differences: list[float], seconds: float) -> str:
    """The page docs/correctness.md."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    lines = [
        "# Exactness",
        "",
        "Each formula of the two papers, computed by the code of a run (float32, tiny models with random weights), and",
        "compared with an independent float64 computation of one sequence at a time, without padding, packing, cache",
        "or adapters. One command generates the table. It fails if a difference exceeds what float32 explains:",
        "",
        "    python benchmarks/exactness.py --output docs/correctness.md",
        "",
        f"It took {seconds:.0f} s on {processor()}, with {versions}.",
        "In the formulas, s is the sigmoid. Differences of gradients and losses are relative to the largest value; a",
        "count is the number of wrong choices.",
        "",
        "| Formula | Source | Computed by | Largest difference | Limit |",
        "|---|---|---|---:|---:|",
    ]
    for row, difference in zip(CHECKS, differences, strict=True):
        number = f"{difference:.0f} wrong" if row.unit == "count" else f"{difference:.1e} {unit(row.unit)}".strip()
        limit = "0" if row.unit == "count" else f"{row.limit:.0e}"
        lines.append(f"| {row.formula.replace('|', chr(92) + '|')} | {row.source} | {row.code} | {number} | {limit} |")
    return "\n".join(lines) + "\n"


def unit(name: str) -> str:
    return {"nats": "nats", "relative": "relative"}.get(name, "")


def processor() -> str:
    """The processor's name and the capability that torch uses."""
    found = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return f"{found[0] if found else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Write the page there.")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    began, differences = time.monotonic(), []
    for row in CHECKS:
        differences.append(row.difference())
        print(f"{differences[-1]:9.1e}  {row.formula}", flush=True)
    page = table(differences, time.monotonic() - began)
    if arguments.output:
        arguments.output.write_text(page, encoding="utf-8")
    above = [row.formula for row, found in zip(CHECKS, differences, strict=True) if not found <= row.limit]
    print("\n".join(f"above its limit: {formula}" for formula in above) or "all within their limits")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
