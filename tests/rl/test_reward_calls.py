"""Asynchronous reward functions, and those that do not return."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest
import torch

from trl_rlaif import UserError
from trl_rlaif.rl.reward_functions import _loop, call_rewards
from trl_rlaif.testing import make_rollout
from trl_rlaif.validation import Origin, RewardError, tagged

ZEROS = [0.0] * 6


async def later(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return [float(i) for i in range(len(prompts))]


def test_asynchronous_rewards_work_in_a_running_event_loop():
    """As in a notebook."""

    async def cell():
        return call_rewards([later], make_rollout(6))

    assert asyncio.run(cell())[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert call_rewards([later], make_rollout(6))[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_asynchronous_rewards_are_awaited_together_and_meanwhile_the_others_are_called():
    """Each of them waits for all others, so that calling them one after the other would never end."""
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


def _waits_for(event, name):
    """A synchronous reward that returns once an event is set."""

    def waits(prompts, **columns):
        assert event.wait(60), name
        return [2.0] * len(prompts)

    return waits


class Caller:
    """An object with an asynchronous call, which sets an event."""

    def __init__(self, event):
        self.event = event

    async def __call__(self, prompts, **columns):
        self.event.set()
        return [1.0] * len(prompts)


@pytest.mark.parametrize("kind", ["function", "picked", "object", "picked object"])
def test_asynchronous_rewards_start_first_and_the_results_keep_their_order(kind):
    """The synchronous one is listed first, and waits for the other."""
    started = threading.Event()

    async def function(prompts, **columns):
        return await Caller(started)(prompts, **columns)

    asynchronous = Caller(started) if "object" in kind else function
    if "picked" in kind:
        asynchronous = tagged(asynchronous, Origin("reward function 'acme' of acme 1.2", "recipe.yaml:7"))
    found = call_rewards([_waits_for(started, kind), asynchronous], make_rollout(6))
    assert [scores.tolist() for scores in found] == [[2.0] * 6, [1.0] * 6]


def test_a_function_that_returns_an_awaitable_starts_when_it_is_called():
    """It is called in order with the synchronous ones, and awaited together with the asynchronous ones."""
    calls, here = [], threading.Barrier(2, timeout=60)

    async def asynchronous(prompts, **columns):
        await asyncio.to_thread(here.wait)
        return [1.0] * len(prompts)

    def synchronous(prompts, **columns):
        calls.append("synchronous")
        return [2.0] * len(prompts)

    def returns_an_awaitable(**given):
        calls.append("awaitable")
        return asynchronous(**given)

    found = call_rewards([synchronous, returns_an_awaitable, asynchronous], make_rollout(6), timeout=60)
    assert calls == ["synchronous", "awaitable"]
    assert [scores[0].item() for scores in found] == [2, 1, 1]


def test_the_time_of_a_synchronous_reward_is_not_an_awaitables():
    """Together they take longer than the limit, but neither does alone."""

    def synchronous(prompts, **columns):
        time.sleep(2)
        return ZEROS

    def awaitable(**given):
        async def call():
            await asyncio.sleep(2)
            return ZEROS

        return call()

    found = call_rewards([synchronous, awaitable], make_rollout(6), timeout=3.5)
    assert [scores.tolist() for scores in found] == [ZEROS] * 2


def test_a_client_keeps_its_event_loop_from_one_call_to_the_next():
    loops = set()

    async def client(prompts, **columns):
        loops.add(id(asyncio.get_running_loop()))
        return ZEROS

    for _ in range(2):
        call_rewards([client], make_rollout(6))
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
        call_rewards([function], make_rollout(6), timeout=0.2)
    named = tagged(function, Origin("reward function 'acme' of acme 1.2", "recipe.yaml:7"))
    with pytest.raises(RewardError, match="recipe.yaml:7: The reward function 'acme' of acme 1.2 has not returned"):
        call_rewards([named], make_rollout(6), timeout=0.2)


def _blocks(release):
    async def blocks(prompts, **columns):
        release.wait(60)
        return ZEROS

    return blocks


async def honest(prompts, **columns):
    await asyncio.sleep(0.01)
    return ZEROS


def test_an_asynchronous_call_that_blocks_the_event_loop_is_said_to():
    release = threading.Event()
    try:
        with pytest.raises(UserError, match="'blocks' has not returned after .* It blocks the event loop"):
            call_rewards([_blocks(release), honest], make_rollout(6), timeout=1)  # honest has not started
    finally:
        release.set()
    assert call_rewards([honest], make_rollout(6), timeout=60)[0].tolist() == ZEROS


def test_where_one_call_keeps_the_event_loop_from_another_no_other_one_is_blamed_for_it():
    release = threading.Event()
    both = "The reward function 'waits' and the reward function 'blocks' have not returned after .* One of them blocks"

    async def waits(prompts, **columns):
        await asyncio.to_thread(release.wait, 60)
        return ZEROS

    try:
        with pytest.raises(UserError, match=both):
            call_rewards([waits, _blocks(release)], make_rollout(6), timeout=1)
        with pytest.raises(UserError, match="'honest' has not returned after .* An earlier call blocks the event loop"):
            call_rewards([honest], make_rollout(6), timeout=0.5)
    finally:
        release.set()


def test_calls_that_wait_for_a_blocked_event_loop_are_timed_from_when_it_comes_to_them():
    """Two calls that each block for less than the limit, but together for more."""

    async def blocks(prompts, **columns):
        time.sleep(2)
        return ZEROS

    found = call_rewards([blocks, blocks, honest], make_rollout(6), timeout=3.5)
    assert [scores.tolist() for scores in found] == [ZEROS] * 3


def test_a_call_that_ended_is_not_late_while_the_next_one_keeps_the_loop():
    """If the loop runs both in one iteration, the result of the first is not seen until the second has ended."""

    async def blocks(prompts, **columns):
        time.sleep(2.5)
        return ZEROS

    _loop().call_soon_threadsafe(time.sleep, 0.5)  # so that both are submitted before the loop starts either
    found = call_rewards([blocks, blocks], make_rollout(6), timeout=3)
    assert [scores.tolist() for scores in found] == [ZEROS] * 2


def test_only_the_calls_that_hang_are_named():
    with pytest.raises(UserError, match="^The reward function 'hangs_too' has not returned after 2 seconds") as caught:
        call_rewards([honest, hangs_too, honest], make_rollout(6), timeout=2)
    assert "event loop" not in str(caught.value)


def test_a_call_that_raises_ends_the_wait_for_one_that_hangs():
    async def fails(prompts, **columns):
        raise ValueError("no such word")

    with pytest.raises(ValueError, match="no such word"):
        call_rewards([hangs_too, fails], make_rollout(6))


def test_a_call_runs_in_the_thread_of_training():
    """In another thread, gradients would be recorded, and signal handlers could not be set (as math_verify does)."""
    seen = []

    def function(prompts, **columns):
        seen.append((threading.current_thread(), torch.is_grad_enabled()))
        signal.signal(signal.SIGALRM, signal.signal(signal.SIGALRM, signal.SIG_IGN))
        return ZEROS

    before = signal.getsignal(signal.SIGINT)
    with torch.no_grad():
        call_rewards([function], make_rollout(6), timeout=60)
    assert seen == [(threading.main_thread(), False)]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def heeds_ctrl_c():
    """Shells make background jobs ignore Ctrl-C, which may include these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_still_stops_a_call(heeds_ctrl_c):
    def interrupted(prompts, **columns):
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        call_rewards([interrupted], make_rollout(6), timeout=60)


def test_a_call_in_another_thread_is_named_and_goes_on(capsys):
    found = []

    def slow(prompts, **columns):
        time.sleep(0.5)
        return ZEROS

    thread = threading.Thread(target=lambda: found.append(call_rewards([slow], make_rollout(6), timeout=0.1)))
    thread.start()
    thread.join()
    assert found[0][0].tolist() == ZEROS
    assert "Warning: the reward function 'slow' has not returned after 0.1 seconds" in " ".join(
        capsys.readouterr().err.split()
    )
