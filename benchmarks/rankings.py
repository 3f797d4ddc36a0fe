"""Ranking K responses with a third of the questions: agreement with the truth, and with all pairs in both orders.

    OMP_NUM_THREADS=1 python benchmarks/rankings.py --output benchmarks/results/rankings.md
    OMP_NUM_THREADS=1 python benchmarks/rankings.py --labels RUN/labels.jsonl --pairs RUN/pairs.jsonl --output FILE.md

A simulated judge: the responses to a prompt have strengths of standard deviation 1 nat, and the one shown first is
preferred with log-odds of their difference, plus the position bias, plus noise, which is drawn once per question: the
same question gets the same answer. The position bias is the same for all prompts, or differs by prompt. With --labels
the judge is a real one, whose answers about all pairs in both orders are from a run (sample.keep_pairs: all).

Agreement is Kendall's tau of two rankings as a percentage of pairs in the same order, (1 + tau) / 2. There are two runs
of all pairs in both orders with different noise: their agreement is the ceiling for any method's agreement with the
second run. The first shares its answers with the methods. Numbers are means over seeds with half of their 95%
t-interval. All rankings are by the Bradley-Terry model of trl_rlaif.ranking; "expected right" is the fraction of pairs
in the right order that the model itself expects.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit
from scipy.stats import norm
from tables import interval

from trl_rlaif.data import Pair
from trl_rlaif.files import read_lines
from trl_rlaif.labels.store import pair_key
from trl_rlaif.ranking.bradley_terry import Comparisons, Strengths, fit
from trl_rlaif.ranking.tournament import Asked, rank_by_tournament

# Noise of a question, position bias, and its standard deviation by prompt, all in nats.
JUDGES = ((0.5, 1.0, 0.0), (1.0, 1.0, 0.0), (1.0, 3.0, 0.0), (1.0, 1.0, 0.5), (2.0, 1.0, 0.0))
HEAD = (
    "| method | questions a prompt | agrees with the truth | with all pairs, same answers | with another run of them | "
    "expected right |\n|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Answers:
    """(G, K, K) probabilities that the row's response is better if shown first; the diagonal is not read."""

    p: np.ndarray

    def ask(self, asked: list[Asked]) -> list[float]:
        """The answers to a tournament's questions."""
        return [float(self.p[q.group, q.first, q.second]) for q in asked]

    def fit(self, asked: np.ndarray) -> Strengths:
        """Strengths fitted to the questions marked in ``asked``, (G, K, K) bool."""
        group, first, second = np.nonzero(asked)
        p = self.p[group, first, second]
        return fit(Comparisons(group, first, second, p, np.ones_like(p)), [self.p.shape[1]] * len(self.p))


@dataclass(frozen=True)
class World:
    """The draw of one seed: the truth, if known, and one or two runs of the judge."""

    answers: Answers
    other: Answers | None = None
    truth: np.ndarray | None = None

    @classmethod
    def simulated(cls, seed: int, prompts: int, size: int, noise: float, bias: float, spread: float) -> World:
        """A simulated judge as described in the module docstring."""
        rng = np.random.default_rng(seed)
        truth = rng.normal(0, 1, (prompts, size))
        biases = bias + rng.normal(0, spread, (prompts, 1, 1))

        def answers() -> Answers:
            noises = rng.normal(0, noise, (prompts, size, size))
            return Answers(expit(truth[:, :, None] - truth[:, None, :] + biases + noises))

        return cls(answers(), answers(), truth)


def all_pairs(answers: Answers, rng: np.random.Generator) -> np.ndarray:
    """Both orders."""
    return np.broadcast_to(~np.eye(answers.p.shape[1], dtype=bool), answers.p.shape)


def one_order(answers: Answers, rng: np.random.Generator) -> np.ndarray:
    """Every pair once, in an order drawn at random."""
    upper = np.triu(rng.random(answers.p.shape) < 0.5, 1)
    return upper | np.tril(~upper.transpose(0, 2, 1), -1)


def at_random(share: int) -> Callable[[Answers, np.random.Generator], np.ndarray]:
    """One in ``share`` questions about each prompt."""

    def choose(answers: Answers, rng: np.random.Generator) -> np.ndarray:
        groups, size, _ = answers.p.shape
        ranks = np.where(np.eye(size, dtype=bool), 2.0, rng.random(answers.p.shape)).reshape(groups, -1).argsort(1)
        asked = np.zeros((groups, size * size), dtype=bool)
        np.put_along_axis(asked, ranks[:, : size * (size - 1) // share], True, axis=1)
        return asked.reshape(answers.p.shape)

    return choose


def tournament(share: int, at_once: int = 1) -> Callable[[Answers, np.random.Generator], np.ndarray]:
    """As many questions, chosen sequentially."""

    def choose(answers: Answers, rng: np.random.Generator) -> np.ndarray:
        groups, size, _ = answers.p.shape
        budget = size * (size - 1) // share
        sizes, asked = [size] * groups, np.zeros(answers.p.shape, dtype=bool)
        for q in rank_by_tournament(answers.ask, sizes, questions=budget, at_once=at_once).asked:
            asked[q.group, q.first, q.second] = True
        return asked

    return choose


def methods(size: int) -> dict[str, Callable[[Answers, np.random.Generator], np.ndarray]]:
    """The functions that choose the questions, by name."""
    return {
        "all pairs, both orders": all_pairs,
        "all pairs, one order": one_order,
        "a third at random": at_random(3),
        f"tournament, a third, {size // 2} a round": tournament(3, size // 2),
        "**tournament, a third**": tournament(3),
        "a sixth at random": at_random(6),
        "tournament, a sixth": tournament(6),
    }


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Percent of pairs in the same order, (1 + Kendall's tau) / 2: mean over prompts. Equal strengths count half."""
    i, j = np.triu_indices(one.shape[1], 1)
    return float(50 + 50 * (np.sign(one[:, i] - one[:, j]) * np.sign(other[:, i] - other[:, j])).mean())


def measured(world: World, seed: int, choose: Callable[[Answers, np.random.Generator], np.ndarray]) -> list[float]:
    """A row of the table for one seed; NaN if there is nothing to compare with."""
    rng = np.random.default_rng([seed, 1])
    asked = choose(world.answers, rng)
    found, whole = world.answers.fit(asked), world.answers.fit(all_pairs(world.answers, rng))
    other = world.other.fit(all_pairs(world.answers, rng)).values if world.other else None
    i, j = np.triu_indices(found.values.shape[1], 1)
    group = np.arange(len(found.values))[:, None]
    difference, error = found.differences(group, i[None], j[None])
    return [
        asked.sum() / len(asked),
        np.nan if world.truth is None else agreement(found.values, world.truth),
        agreement(found.values, whole.values),
        np.nan if other is None else agreement(found.values, other),
        100 * float(norm.cdf(np.abs(difference) / error).mean()),
    ]


def table(worlds: list[World]) -> Iterator[str]:
    """The table's lines, as soon as they are known."""
    yield HEAD
    for name, choose in methods(worlds[0].answers.p.shape[1]).items():
        columns = np.array([measured(world, seed, choose) for seed, world in enumerate(worlds)]).T
        shown = ["" if np.isnan(values).any() else f"{interval(values, 1)}%" for values in columns[1:]]
        if choose is all_pairs:
            shown[1] = ""
        yield f"| {name} | {columns[0].mean():g} | " + " | ".join(shown) + " |"


def of_run(labels: Path, pairs: Path) -> dict[int, World]:
    """The prompts of a run by number of responses, as worlds of one judge without a known truth."""
    known = {
        row["pair"]: row for row in read_lines(labels) if row.get("p_12") is not None and row.get("p_21") is not None
    }
    groups: dict[str, list[Pair]] = {}
    for row in read_lines(pairs):
        pair = Pair(row["id"], row["prompt"], row["response_1"], row["response_2"])
        groups.setdefault(pair.id.rsplit("-", 2)[0], []).append(pair)
    found: dict[int, list[np.ndarray]] = {}
    for of in groups.values():
        if any(pair_key(pair) not in known for pair in of):  # a run that was stopped, or what could not be judged
            continue
        texts = list(dict.fromkeys(text for pair in of for text in (pair.response_1, pair.response_2)))
        p = np.full((len(texts), len(texts)), np.nan)
        for pair in of:
            i, j = texts.index(pair.response_1), texts.index(pair.response_2)
            row = known[pair_key(pair)]
            p[i, j], p[j, i] = row["p_12"], 1 - row["p_21"]
        found.setdefault(len(texts), []).append(p)
    return {size: World(Answers(np.stack(of))) for size, of in sorted(found.items()) if size > 2}


def _cases(args: argparse.Namespace) -> Iterator[tuple[str, list[World]]]:
    if args.labels:
        for size, world in of_run(args.labels, args.pairs).items():
            whole = world.answers.fit(all_pairs(world.answers, np.random.default_rng(0)))
            yield (
                f"K = {size}, {len(world.answers.p)} prompts, standing first is worth {whole.position:+.2f} nats",
                [world],
            )
        return
    for size in (4, 8):
        for noise, bias, spread in JUDGES:
            by_prompt = f" (± {spread:g} by prompt)" if spread else ""
            worlds = [World.simulated(s, args.prompts, size, noise, bias, spread) for s in range(args.seeds)]
            yield f"K = {size}, noise {noise:g}, position bias {bias:g}{by_prompt}", worlds


def main() -> None:
    """Run all cases; print the tables and, with ``--output``, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--labels", type=Path, help="labels.jsonl of a run")
    parser.add_argument("--pairs", type=Path, help="pairs.jsonl of the same run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [f"<!-- python benchmarks/rankings.py --seeds {args.seeds} --prompts {args.prompts} -->"]
    for title, worlds in _cases(args):
        began = time.monotonic()
        lines += ["", f"### {title}", ""]
        for line in table(worlds):
            lines.append(line)
            print(line, flush=True)
        print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)
        if args.output:
            args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
