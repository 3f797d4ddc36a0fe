"""`rl.algorithm: rloo | grpo` in two processes."""

from __future__ import annotations

import pytest
import torch
from helpers import group_processes
from helpers.processes import fork

pytestmark = [pytest.mark.trl, pytest.mark.slow]

ALGORITHMS = pytest.mark.parametrize("algorithm", group_processes.TRAINERS)


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """The results of each of two processes."""
    return fork(group_processes.__file__, tmp_path_factory.mktemp("groups"), tiny_model)


@ALGORITHMS
@pytest.mark.parametrize("rank", [0, 1])
def test_with_nothing_added_the_policy_is_trls(two, algorithm, rank):
    ours, plain = (two[rank][algorithm][name] for name in ("ours", "plain"))
    assert len(ours["metrics"]) == len(plain["metrics"]) == 3
    assert abs(ours["metrics"][-1]["kl"]) > 1e-6  # the policy has moved, so the comparison is meaningful
    for mine, theirs in zip(ours["metrics"], plain["metrics"], strict=True):
        for name in ("reward", "kl", "loss", "completions/mean_length"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert ours["parameters"].keys() == plain["parameters"].keys() != set()
    for name, value in plain["parameters"].items():
        torch.testing.assert_close(ours["parameters"][name], value, rtol=1e-3, atol=1e-5)


@ALGORITHMS
@pytest.mark.parametrize("run", ["ours", "rehearsed"])
def test_both_processes_hold_the_same_policy(two, algorithm, run):
    first, second = (result[algorithm][run] for result in two)
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
    assert first["pairs"] == second["pairs"]
    for mine, theirs in zip(first["metrics"], second["metrics"], strict=True):
        assert mine["objective/scores"] == theirs["objective/scores"] == pytest.approx(mine["reward"], abs=1e-5)


@ALGORITHMS
def test_what_is_rehearsed_moves_the_policy_of_both(two, algorithm):
    ours, rehearsed = (two[0][algorithm][name] for name in ("ours", "rehearsed"))
    assert len(rehearsed["pairs"]) == 4 and not ours["pairs"]
    assert all("rehearsal/nll" in row for row in rehearsed["metrics"])
    assert any(not torch.equal(v, ours["parameters"][n]) for n, v in rehearsed["parameters"].items())
