"""Two processes match one on the same prompts, resume where they were stopped, and stop together."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from helpers import ppo_processes, ppo_task
from helpers.processes import fork, launch

pytestmark = pytest.mark.trl


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in this process: all eight prompts in two micro-batches of four."""
    return ppo_task.run(tmp_path_factory.mktemp("one"), rows=4, accumulation=2)


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def kind(request):
    """The packaged accelerate configuration that starts two processes."""
    if request.param != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return request.param


@pytest.fixture(scope="module")
def two(tmp_path_factory, kind):
    """The run in two processes with four prompts each: the results of rank 0 and of rank 1."""
    run = fork if kind == "ddp" else partial(launch, kind)
    results = run(ppo_task.__file__, tmp_path_factory.mktemp("two"), "4")
    assert [r["processes"] for r in results] == [2, 2]
    return results


@pytest.fixture(scope="module")
def more(tmp_path_factory, kind):
    """Behavior that only several processes show: the results of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("more")
    names = ("resumed", "selected", "shown", "missing", "failed", "diverged", "refused")
    return launch(kind, ppo_processes.__file__, folder, *names)


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
        assert {n: ours[n] for n in ppo_task.METRICS} == pytest.approx(
            {n: theirs[n] for n in ppo_task.METRICS}, rel=1e-3, abs=1e-5
        )


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


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_goes_on_bit_for_bit(more, rank):
    whole, resumed = (more[rank]["resumed"][name] for name in ("whole", "resumed"))
    assert len(whole["prompts"]) == 5 and whole["prompts"][2:] == resumed["prompts"]
    assert whole["metrics"] == resumed["metrics"]
    for name, value in whole["parameters"].items():
        assert torch.equal(value, resumed["parameters"][name]), name


@pytest.mark.slow
def test_selectors_choose_once_from_all_prompts(more):
    first, second = (result["selected"] for result in more)
    prompts, categories = first["dataset"]["prompt"], first["dataset"]["category"]
    assert first["pool"] == (prompts, 9, 9, categories)
    assert second["pool"] is None, "the second process has chosen too"
    assert first["rows"] == second["rows"] and len(first["rows"]) == 8
    strata = {prompts[row]: i >= 4 for i, row in enumerate(first["rows"])}
    for update in (0, 1):
        halves = [result["selected"]["prompts"][update] for result in more]
        assert sorted(halves[0] + halves[1]) == sorted(prompts[i] for i in first["rows"])
        assert sum(strata[prompt] for prompt in halves[0]) == 2  # every batch has both strata in equal shares


@pytest.mark.slow
def test_processes_rehearse_the_same_pairs_and_learn_the_same_from_them(more):
    first, second = (result["selected"] for result in more)
    assert first["pairs"] == second["pairs"] and len(first["pairs"]) == 9
    assert first["rehearsed"] == second["rehearsed"] > 0
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name


@pytest.mark.slow
def test_every_prompt_is_shown_once(more):
    first, second = (result["shown"] for result in more)
    assert [prompt for prompt, _, _ in first["all"]] == first["prompts"]
    assert [prompt for prompt, _, _ in first["first"]] == [first["prompts"][row] for row in (0, 1, 3, 4)]
    assert (first["all"], first["first"]) == (second["all"], second["first"])


@pytest.mark.slow
def test_responses_without_a_reward_are_counted_over_both(more):
    first, second = (results["missing"] for results in more)
    assert first["unscored"] == second["unscored"] == 8
    assert [entry["rollout/unscored"] for entry in first["metrics"]] == [0, 0.5, 0.5]
    assert first["metrics"] == second["metrics"]
    for name, value in first["parameters"].items():
        assert value.isfinite().all() and torch.equal(value, second["parameters"][name])


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_stops_both(more):
    first, second = (result["failed"]["raised"] for result in more)
    assert (second["kind"], second["message"]) == ("ZeroDivisionError", "division by zero")
    assert first["kind"] == "RunError" and "Process 1 failed: ZeroDivisionError: division by zero" in first["message"]


@pytest.mark.slow
def test_a_wrong_reward_in_one_process_stops_both_with_a_checkpoint(more):
    first, second = (result["failed"]["nan"] for result in more)
    assert first["kind"] == second["kind"] == "UserError"
    assert "returned nan for 4 of 4" in second["message"] and first["message"].endswith(second["message"])
    assert first["checkpoints"] == second["checkpoints"] == ["checkpoint-1"]


@pytest.mark.slow
def test_gradients_that_are_nan_in_one_process_stop_both(more, kind):
    first, second = (result["diverged"] for result in more)
    assert first == second and first[0] == "RunError"
    assert "stopped at update 1: its gradients are not finite" in first[1]
    assert first[2] or kind == "zero2", "NaN has reached the weights"


@pytest.mark.slow
def test_both_refuse_a_model_whose_numbers_are_wrong_in_one(more):
    assert [result["refused"][0] for result in more] == ["UserError"] * 2
    assert more[0]["refused"] == more[1]["refused"]
    assert "the policy's forward pass" in more[0]["refused"][1]
