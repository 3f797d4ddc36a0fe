"""Two processes give what one gives with the same prompts: the rewards, the losses and the adapters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ppo_task

from trl_rlaif.recipe.paths import recipes_dir

# Not compared: what is measured in time, and the variance over micro-batches, which are others in each run.
METRICS = [
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "score/share_of_yes",
    "rollout/length",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "episode",
    "lr",
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in this process: all eight prompts in two micro-batches of four."""
    return ppo_task.run(tmp_path_factory.mktemp("one"), rows=4, accumulation=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run in two processes with four prompts each: the results of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("two")
    _launch("--num_processes", "2", ppo_task.__file__, str(folder), "4")
    results = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    assert [r["processes"] for r in results] == [2, 2]
    return results


def _launch(*arguments: str) -> None:
    """``accelerate launch`` as users start it, with the packaged configuration, on gloo instead of GPUs."""
    config = recipes_dir() / "accelerate" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {
        # `--cpu` cannot be used: without MPI accelerate then starts a single process, and does not say so.
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(
        [*command, "--mixed_precision", "no", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers too: killing the launcher alone leaves them behind
        pytest.fail(f"The processes did not end:\n{process.communicate()[0][-4000:]}")
    assert process.returncode == 0, output[-4000:]


def test_each_process_draws_for_its_own_half_of_the_prompts(one, two):
    everything = sorted(one["prompts"][0])
    for update in range(3):
        halves = [result["prompts"][update] for result in two]
        assert [len(half) for half in halves] == [4, 4]
        assert sorted(halves[0] + halves[1]) == everything


@pytest.mark.parametrize("rank", [0, 1])
def test_the_metrics_are_those_of_one_process(one, two, rank):
    assert [m["step"] for m in two[rank]["metrics"]] == [1, 2, 3]
    for ours, theirs in zip(two[rank]["metrics"], one["metrics"], strict=True):
        assert {n: ours[n] for n in METRICS} == pytest.approx({n: theirs[n] for n in METRICS}, rel=1e-3, abs=1e-5)


def test_rewards_by_category_are_of_all_processes(one, two):
    for ours, theirs in zip(two[0]["metrics"], one["metrics"], strict=True):
        names = ["reward/a", "reward/b"]
        assert {n: ours.get(n) for n in names} == pytest.approx({n: theirs[n] for n in names})


@pytest.mark.parametrize("rank", [0, 1])
def test_the_adapters_are_those_of_one_process(one, two, rank):
    ours, theirs = two[rank]["parameters"], one["parameters"]
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert not torch.equal(theirs[name], one["start"][name]), f"{name} has not learned: nothing is compared"
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
