"""Two processes with sharded frozen weights (FSDP2) train like one process, or like two without sharding."""

from __future__ import annotations

import pytest
import torch
from helpers import fsdp_processes, group_processes, ppo_task, reward_processes
from helpers.processes import launch

from trl_rlaif.reward import scoring

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output folder of the two processes."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(tiny_model, folder):
    """The results of two processes started with the packaged configuration."""
    return launch("fsdp2", fsdp_processes.__file__, folder, tiny_model)


def _assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_ppo_is_that_of_one_process_which_goes_on_from_its_checkpoint(two, folder, tmp_path):
    one = ppo_task.run(tmp_path / "one", rows=4, accumulation=2)
    resumed = ppo_task.run(tmp_path / "resumed", rows=4, accumulation=2, resume=folder / "ppo" / "checkpoint-2")
    assert len(resumed["prompts"]) == 1
    _assert_same(resumed["parameters"], one["parameters"])
    for result in (of["ppo"] for of in two):
        assert result["shared_out"] and not one["shared_out"]
        for ours, theirs in zip(result["metrics"], one["metrics"], strict=True):
            names = ppo_task.METRICS
            assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-5)
        _assert_same(result["parameters"], one["parameters"])


def test_a_reward_model_is_that_of_one_process_though_its_passes_are_not(two, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_reads_rows", scoring._reads_rows)  # restores what `run` replaces
    one = reward_processes.run(tmp_path, batch=4, rows=True)
    first, second = (of["reward"] for of in two)
    assert first["forwards"] == second["forwards"] != one["forwards"]
    for result in (first, second):
        assert result["shared_out"]
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert result["factors"] == pytest.approx(one["factors"])
        _assert_same(result["parameters"], one["parameters"])


@pytest.mark.parametrize("algorithm", group_processes.TRAINERS)
def test_groups_are_trained_as_without_sharing_out(two, algorithm):
    for result in two:
        ours, whole = result[algorithm], result[f"{algorithm}, whole"]
        assert ours["shared_out"] and not whole["shared_out"]
        assert ours["pairs"] == whole["pairs"] and len(ours["pairs"]) == 4
        assert abs(ours["metrics"][-1]["kl"]) > 1e-6  # the policy has moved, so the comparison is meaningful
        for mine, theirs in zip(ours["metrics"], whole["metrics"], strict=True):
            for name in ("reward", "kl", "loss", "rehearsal/nll"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        _assert_same(ours["parameters"], whole["parameters"])
        _assert_same(ours["parameters"], two[0][algorithm]["parameters"])


def test_4_bit_weights_are_shared_out_and_give_the_same(two):
    for result in two:
        part, gathered, whole = (result["nf4"][name] for name in ("part", "gathered", "whole"))
        assert part["held"] * 2 == gathered["held"] == whole["held"]
        assert part["loss"] == gathered["loss"] == whole["loss"]
        for name, gradient in whole["gradients"].items():
            assert torch.equal(part["gradients"][name], gradient) and gradient.any(), name
    assert two[0]["nf4"]["part"]["loss"] != two[1]["nf4"]["part"]["loss"]
