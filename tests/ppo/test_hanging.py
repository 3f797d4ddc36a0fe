"""Reward functions that are awaited, and those that do not return."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest
import torch

from trl_rlaif import UserError
from trl_rlaif.contracts import Origin, RewardError, picked
from trl_rlaif.ppo.rewards import call_reward, call_rewards
from trl_rlaif.testing import make_rollout

ZEROS = [0.0] * 6


async def later(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return [float(i) for i in range(len(prompts))]


def test_asynchronous_rewards_work_in_a_running_event_loop():
    """As in a notebook."""

    async def cell():
        return call_reward(later, make_rollout(6))

    assert asyncio.run(cell()).tolist() == [0, 1, 2, 3, 4, 5]
    assert call_reward(later, make_rollout(6)).tolist() == [0, 1, 2, 3, 4, 5]


def test_asynchronous_rewards_are_awaited_together_and_meanwhile_the_others_are_called():
    """Each of them waits for all others, so that they would wait for ever one after the other."""
    here = threading.Barrier(3, timeout=30)

    async def first(prompts, **columns):
        await asyncio.to_thread(here.wait)
        return [1.0] * len(prompts)

    async def second(prompts, **columns):
        await asyncio.to_thread(here.wait)
        return [2.0] * len(prompts)

    def third(prompts, **columns):
        here.wait()
        return [3.0] * len(prompts)

    found = call_rewards([first, second, third], make_rollout(6))
    assert [scores.tolist() for scores in found] == [[1.0] * 6, [2.0] * 6, [3.0] * 6]


def test_a_client_keeps_its_event_loop_from_one_call_to_the_next():
    loops = set()

    async def client(prompts, **columns):
        loops.add(id(asyncio.get_running_loop()))
        return ZEROS

    for _ in range(2):
        call_reward(client, make_rollout(6))
    assert len(loops) == 1


def hangs(prompts, **columns):
    time.sleep(60)


async def hangs_too(prompts, **columns):
    await asyncio.sleep(60)


def never_gives_up(prompts, **columns):
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


@pytest.mark.parametrize("function", [hangs, hangs_too, never_gives_up])
def test_a_call_that_hangs_is_named(function):
    with pytest.raises(UserError, match=f"'{function.__name__}' has not returned after 0.2 seconds.*reward_timeout"):
        call_reward(function, make_rollout(6), timeout=0.2)
    named = picked(function, Origin("reward function 'acme' of acme 1.2", "recipe.yaml:7"))
    with pytest.raises(RewardError, match="recipe.yaml:7: The reward function 'acme' of acme 1.2 has not returned"):
        call_reward(named, make_rollout(6), timeout=0.2)


def test_a_call_runs_in_the_thread_of_training():
    """In another one, gradients would be recorded, and signal handlers could not be set (as math_verify does)."""
    seen = []

    def function(prompts, **columns):
        seen.append((threading.current_thread(), torch.is_grad_enabled()))
        signal.signal(signal.SIGALRM, signal.signal(signal.SIGALRM, signal.SIG_IGN))
        return ZEROS

    before = signal.getsignal(signal.SIGINT)
    with torch.no_grad():
        call_reward(function, make_rollout(6), timeout=60)
    assert seen == [(threading.main_thread(), False)]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_still_stops_a_call():
    def interrupted(prompts, **columns):
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        call_reward(interrupted, make_rollout(6), timeout=60)


def test_a_call_in_another_thread_is_named_and_goes_on(capsys):
    found = []

    def slow(prompts, **columns):
        time.sleep(0.5)
        return ZEROS

    thread = threading.Thread(target=lambda: found.append(call_reward(slow, make_rollout(6), timeout=0.1)))
    thread.start()
    thread.join()
    assert found[0].tolist() == ZEROS
    assert "Warning: the reward function 'slow' has not returned after 0.1 seconds" in " ".join(
        capsys.readouterr().err.split()
    )
