"""Combining the votes of several judges without ground truth: accuracy and calibration against the best judge.

    OMP_NUM_THREADS=1 python benchmarks/juries.py --output benchmarks/results/juries.md

Simulated: response 1 of a pair is better than response 2 by d nats, d normal with a standard deviation of 2, and a
human prefers it with log-odds d; that choice is the truth. A member observes d plus its own noise, in multiples of d's
standard deviation, part of which is common to a group. It states its observation times its confidence; 1 ignores the
noise. A member asked in one order has a position bias, in nats, towards the response shown first, which is response 1
in half of the pairs; for the others, asked in both orders, such a bias cancels. In the last jury each member chooses
the better response independently at its own rate, as in Dawid and Skene's model, and is always 90% confident.

"by people": log_odds, then label.calibration on 100 further pairs whose better response is known. "best member" is the
one that agrees with the truth most often, which a jury does not know. Numbers are means over seeds with half of their
95% t-interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit
from tables import interval

from trl_rlaif.evaluation import calibration_error
from trl_rlaif.labels.calibration import Calibration, log_losses
from trl_rlaif.labels.jury import DawidSkene, LogOddsPool

SPREAD, JUDGED = 2.0, 100
HEAD = "| joined by | accuracy | ECE | log-loss |\n|---|---|---|---|"


@dataclass(frozen=True)
class Members:
    """One entry per member: noise, confidence, the fraction of noise common to a group, and position bias."""

    noise: tuple[float, ...]
    confidence: tuple[float, ...]
    shared: tuple[float, ...]
    bias: tuple[float, ...]

    def vote(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count, J) probabilities that response 1 is better, and (count,) bool whether it is."""
        d = rng.normal(0, SPREAD, (count, 1))
        truth = rng.random(count) < expit(d[:, 0])
        shared = np.array(self.shared)
        common, own = rng.normal(0, 1, (count, 1)), rng.normal(0, 1, (count, len(shared)))
        seen = d + SPREAD * np.array(self.noise) * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
        first = np.where(rng.random((count, 1)) < 0.5, 1, -1)
        return expit(np.array(self.confidence) * seen + np.array(self.bias) * first), truth


@dataclass(frozen=True)
class Deciders:
    """Members that independently choose the better response at these rates."""

    rates: tuple[float, ...]

    def vote(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See ``Members``."""
        truth = rng.random(count) < 0.5
        right = rng.random((count, len(self.rates))) < self.rates
        return np.where(right == truth[:, None], 0.9, 0.1), truth


def jury(noise: tuple[float, ...], **given: tuple[float, ...]) -> Members:
    """Members; default: confidence 1, no common noise, no bias."""
    size = len(noise)
    defaults = {"confidence": (1.0,) * size, "shared": (0.0,) * size, "bias": (0.0,) * size}
    return Members(noise, **(defaults | given))


JURIES: dict[str, Members | Deciders] = {
    "alike: four members, noise 1": jury((1, 1, 1, 1)),
    "differing: noise 0.5, 1, 2, 3": jury((0.5, 1, 2, 3)),
    "one good member: noise 0.4, four with 2": jury((0.4, 2, 2, 2, 2)),
    "one bad and sure: noise 0.5, 1, 1 and 5, which is stated three times as sure": jury(
        (0.5, 1, 1, 5), confidence=(1, 1, 1, 3)
    ),
    "confidences differ: noise 0.5, 1, 2, 3, stated times 0.3, 3, 0.3, 3": jury(
        (0.5, 1, 2, 3), confidence=(0.3, 3, 0.3, 3)
    ),
    "one order: noise 1, one member with a position bias of 3": jury((1, 1, 1, 1), bias=(0, 0, 0, 3)),
    "all related: noise 1, half of it shared by all": jury((1, 1, 1, 1), shared=(0.5,) * 4),
    "a wrong majority: three with noise 1.5, of which they share 80%, one with 0.7": jury(
        (1.5, 1.5, 1.5, 0.7), shared=(0.8, 0.8, 0.8, 0)
    ),
    "independent errors: right in 90%, 75%, 65% and 60%": Deciders((0.9, 0.75, 0.65, 0.6)),
}


def calibrated(votes: np.ndarray, judged: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A log-odds pool with the temperature fitted to human choices on other pairs."""
    pool = LogOddsPool.fit(votes)
    fitted = Calibration.fit([{"p": p} for p in pool.join(judged[0]).tolist()], np.where(judged[1], 1, 2).tolist())
    return np.array([fitted.apply({"p": p}) for p in pool.join(votes).tolist()])


def best_member(votes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The votes of the member that is right most often."""
    return votes[:, np.argmax(((votes > 0.5) == truth[:, None]).mean(axis=0))]


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean of probabilities": lambda votes: votes.mean(axis=1),
    "majority, as its share": lambda votes: (votes > 0.5).mean(axis=1),
    "**log_odds**": lambda votes: LogOddsPool.fit(votes).join(votes),
    "**dawid_skene**": lambda votes: DawidSkene.fit(votes).join(votes),
    "dawid_skene, votes rounded": lambda votes: DawidSkene.fit(np.round(votes)).join(np.round(votes)),
}


def measure(p: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Accuracy in percent (0.5 counts half), ECE in percent, log loss in nats per pair."""
    human = np.where(truth, 1, 2).tolist()
    right = np.where(p == 0.5, 0.5, (p > 0.5) == truth)
    return 100 * right.mean(), 100 * calibration_error(p.tolist(), human), log_losses(p, human).mean()


def table(members: Members | Deciders, seeds: int, pairs: int) -> str:
    """The rows of one jury."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        (votes, truth), judged = members.vote(rng, pairs), members.vote(rng, JUDGED)
        joined = {"best member": best_member(votes, truth)}
        joined |= {name: method(votes) for name, method in METHODS.items()}
        joined["log_odds, by people"] = calibrated(votes, judged)
        for name, p in joined.items():
            found.setdefault(name, []).append(measure(p, truth))
    rows = [HEAD]
    for name, values in found.items():
        accuracy, ece, loss = zip(*values, strict=True)
        rows.append(f"| {name} | {interval(accuracy, 1)}% | {interval(ece, 1)}% | {interval(loss, 3)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = "\n\n".join(f"### {name}\n\n{table(members, args.seeds, args.pairs)}" for name, members in JURIES.items())
    text = f"{args.seeds} seeds of {args.pairs} pairs.\n\n{text}\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
