"""Benchmark accuracy and RewardBench 2's Ties score, by hand and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trl_rlaif.evaluation import share_interval
from trl_rlaif.evaluation.benchmark import ScoredRow, accuracy_by, benchmark_accuracy, best_of, ties_score


@pytest.mark.parametrize(
    ("chosen", "rejected", "point"),
    [(2, [1], 1), (1, [2], 0), (1, [1], 1 / 2), (3, [1, 2, 0], 1), (2, [1, 2, 2], 1 / 3), (2, [1, 2, 3], 0)],
)
def test_a_row_counts_by_its_highest_score(chosen, rejected, point):
    assert best_of(ScoredRow([chosen], rejected, 0)) == point


def test_accuracy_and_its_interval_by_hand():
    rows = [ScoredRow([1], [0], "a"), ScoredRow([0], [1], "a"), ScoredRow([1], [1, 0], "b"), ScoredRow([1], [0], "c")]
    found = benchmark_accuracy(rows)
    assert found == {"rate": 2.5 / 4, "interval": share_interval([1, 0, 0.5, 1], list("aabc")), "n": 4, "ties": 1}
    alike = benchmark_accuracy([ScoredRow([i // 4], [0.5], i // 4) for i in range(8)])  # two prompts, four times each
    points = [float(i // 4) for i in range(8)]
    assert alike["interval"] == share_interval(points, points) != share_interval(points)
    by = accuracy_by(["Math", "Math", "Focus", None], rows)
    assert {name: (of["rate"], of["n"]) for name, of in by.items()} == {
        "Math": (0.5, 2),
        "Focus": (0.5, 1),
        "(none)": (1, 1),
    }


def test_the_score_of_ties_by_hand():
    ref = {
        1: ScoredRow([5.0], [1.0], 1),  # gap 4
        2: ScoredRow([2.0], [3.0], 2),  # gap -1
        3: ScoredRow([1.0], [0.0], 3),  # gap 1
    }
    tied = {
        1: ScoredRow([6.0, 5.0], [3.0, 0.0], 1),  # gap 2, spread 1
        2: ScoredRow([6.0, 5.0], [1.0], 2),  # gap 4, spread 1
        4: ScoredRow([2.0, 2.0, 2.0], [2.0], 4),  # gap 0: wrong
    }
    found = ties_score(ref, tied)
    assert found["accuracy_ref"] == pytest.approx(2 / 3) and found["accuracy_tied"] == pytest.approx(2 / 3)
    # Only prompts 1 and 2 have both rows: their smaller gaps are 2 and -1, their spreads 1 and 1.
    assert (found["prefers_correctness"], found["prefers_correctness_hard"]) == (1.0, 0.5)
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 1 - 1)) / 2
    assert found["margin"] == pytest.approx(margin, abs=1e-15)
    expected = 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 1 + 0.2 * 0.5 + 0.01 * margin
    assert found["score"] == pytest.approx(expected, abs=1e-15) and found["n"] == 6


@pytest.mark.parametrize(
    ("gap", "margin"),
    [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)],  # no spread: gap / spread is infinite or 0 / 0
)
def test_right_answers_of_one_score(gap, margin):
    both = {kind: {1: ScoredRow([gap] * kind, [0.0], 1)} for kind in (1, 3)}
    found = ties_score(both[1], both[3])
    assert found["margin"] == margin and found["interval"] is None
    assert found["prefers_correctness"] == float(gap > 0)


def test_the_interval_of_ties_is_that_of_the_prompts():
    """With both rows for every prompt, the score is a mean over prompts and the interval about +-2 standard errors."""
    rng = np.random.default_rng(0)
    ref = {i: ScoredRow([rng.normal()], rng.normal(-1, 1, 2).tolist(), i) for i in range(80)}
    tied = {i: ScoredRow(rng.normal(0, 1, 3).tolist(), rng.normal(-2, 1, 2).tolist(), i) for i in range(80)}
    found = ties_score(ref, tied)
    each = [ties_score({i: ref[i]}, {i: tied[i]})["score"] for i in range(80)]
    assert found["score"] == pytest.approx(np.mean(each), abs=1e-12)
    half = 1.96 * np.std(each) / math.sqrt(80)
    assert found["interval"] == pytest.approx((found["score"] - half, found["score"] + half), abs=0.1 * half)
