"""Round-robin comparisons against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from trl_rlaif.evaluation import all_against_all, share_interval, win_rate

P = {
    ("a", "b"): [0.9, 0.5, 0.2, None],
    ("c", "a"): [0.6, 0.4, 0.4, 0.1],
    ("b", "c"): [None, None, 0.8, None],
}


def test_each_pair_is_its_win_rate_and_its_mirror_the_rest():
    found = all_against_all(["a", "b", "c"], P)["pairs"]
    assert found["a"]["b"] == win_rate([0.9, 0.5, 0.2]) | {"unjudged": 1}
    assert found["a"]["c"]["win_rate"] == 0.75 and found["c"]["a"]["win_rate"] == 0.25
    assert (found["b"]["a"]["wins"], found["b"]["a"]["ties"], found["b"]["a"]["losses"]) == (1, 1, 1)
    assert found["b"]["c"]["unjudged"] == 3 and found["c"]["b"]["losses"] == 1


def test_overall_counts_opponents_alike_and_leaves_out_who_was_not_judged():
    overall = all_against_all(["a", "b", "c"], P)["overall"]
    # Per prompt, for a: (1 + 0)/2, (.5 + 1)/2, (0 + 1)/2, and 1 against a single opponent.
    assert overall["a"]["win_rate"] == pytest.approx((0.5 + 0.75 + 0.5 + 1) / 4)
    assert overall["b"] | {"interval": None} == {"win_rate": pytest.approx(0.5), "interval": None, "n": 3}
    assert overall["c"]["n"] == 4


def test_the_interval_is_over_prompts():
    rng = np.random.default_rng(3)
    p = {("a", "b"): list(rng.random(40)), ("a", "c"): list(rng.random(40)), ("b", "c"): list(rng.random(40))}
    ours = all_against_all(["a", "b", "c"], p)["overall"]["a"]["interval"]
    means = [np.mean([x > 0.5, y > 0.5]) for x, y in zip(p["a", "b"], p["a", "c"], strict=True)]
    assert ours == pytest.approx(share_interval(means), abs=1e-12)
    texts = [i // 2 for i in range(40)]  # every prompt occurs twice
    clustered = all_against_all(["a", "b", "c"], p, texts)
    assert clustered["overall"]["a"]["interval"] == pytest.approx(share_interval(means, texts), abs=1e-12)
    points = [float(x > 0.5) for x in p["a", "b"]]
    assert clustered["pairs"]["a"]["b"]["interval"] == pytest.approx(share_interval(points, texts), abs=1e-12)


def test_what_is_missing_or_said_twice_is_refused():
    with pytest.raises(ValueError, match="one comparison of a and c"):
        all_against_all(["a", "b", "c"], {("a", "b"): [0.1], ("b", "c"): [0.1]})
    with pytest.raises(ValueError, match="one comparison of a and b"):
        all_against_all(["a", "b"], {("a", "b"): [0.1], ("b", "a"): [0.9]})
    with pytest.raises(ValueError, match="different numbers of prompts"):
        all_against_all(["a", "b", "c"], {("a", "b"): [0.1], ("b", "c"): [0.1, 0.2], ("a", "c"): [0.3]})
    assert all_against_all(["a", "b"], {("a", "b"): [None]}) == {
        "pairs": {"a": {"b": None}, "b": {"a": None}}, "overall": {"a": None, "b": None},
    }  # fmt: skip
