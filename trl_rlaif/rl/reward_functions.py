"""Calls reward functions with GRPOTrainer's signature and checks their scores; a call that hangs is named."""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures
import inspect
import math
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.components import numbered
from trl_rlaif.errors import TrlRlaifError
from trl_rlaif.progress import say
from trl_rlaif.validation import Origin, RewardError, origin_of

if TYPE_CHECKING:
    from trl_rlaif.types import Responses

RewardFunc = Callable[..., Any]
MODEL = "model"
_LATE = "not returned after {:g} seconds, the limit that reward_timeout sets"
_FIX = "Find out what {} for, or raise reward_timeout (null: no limit)."
_BLOCKED = "{} blocks the event loop of asynchronous rewards: call time.sleep, requests and such in asyncio.to_thread."
# An idle loop answers within a millisecond; the rest is margin for busy machines.
_ANSWER_SECONDS = 0.5


def reward_name(function: RewardFunc) -> str:
    """A reward function's name in the metrics."""
    return getattr(function, "__name__", type(function).__name__)


def reward_names(functions: Sequence[RewardFunc], *, model: bool) -> list[str]:
    """All rewards' names in the metrics, in the order of ``reward_weights``: the reward model, then the functions."""
    names = [MODEL] if model else []
    for function in functions:
        names.append(numbered(reward_name(function), names))
    return names


def call_rewards(
    functions: Sequence[RewardFunc], responses: Responses, *, timeout: float | None = None, **extra: Any
) -> list[torch.Tensor]:
    """Call every function as ``f(prompts=, completions=, completion_ids=, **columns)`` and check its return value.

    Coroutine functions start first and run concurrently, in an event loop of their own. Meanwhile the others are called
    in this thread, one after another; an awaitable that one of them returns joins that loop.

    Args:
        timeout: Seconds that each call may take from its own start; one that takes longer ends the run. Asynchronous
            calls are checked once the others have returned. None: no limit.
        extra: Further arguments for every call.

    Returns:
        For each function, in their order, (B,) float32: finite, or NaN where it returned None.

    Raises:
        UserError: Not one number or None for each row, a number that is NaN or infinite, or no result in time; names
            the function and the row. If one blocks the event loop, all that run in it are named.
        RewardError: The same for a function that a recipe names, or an exception in it.
    """
    rows = zip(responses.response_ids.tolist(), responses.response_lengths, strict=True)
    ids = [row[:length] for row, length in rows]
    given = {"prompts": responses.prompts, "completions": responses.completions, "completion_ids": ids}
    given |= responses.columns | extra
    origins = [origin_of(function, "reward function") for function in functions]
    results: dict[int, Any] = {}
    calls: dict[int, AsyncCall] = {}
    try:
        for i in sorted(range(len(functions)), key=lambda i: not _is_coroutine_function(functions[i])):
            with origins[i].blamed("the call", RewardError), named_when_it_hangs(origins[i], timeout):
                results[i] = functions[i](**given)
            if inspect.isawaitable(results[i]):
                calls[i] = AsyncCall(origins[i], results[i])
        wait_for_all(list(calls.values()), timeout)
        results |= {i: call.result() for i, call in calls.items()}
    finally:
        for call in calls.values():
            call.cancel()
    return [_checked(results[i], origin, responses.prompts) for i, origin in enumerate(origins)]


def _is_coroutine_function(function: RewardFunc) -> bool:
    """Also for a function from a recipe, which is wrapped, and an object with such a ``__call__``."""
    function = inspect.unwrap(function)
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004


def _checked(values: Any, origin: Origin, prompts: list[Any]) -> torch.Tensor:
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if not isinstance(values, Iterable) or isinstance(values, str):
        what = f"returned {_shown(values)} for {len(prompts)} completions"
        raise origin.error(what, "It must return a list with one number or None for each completion.", RewardError)
    given = list(values)
    values = [math.nan if value is None else value for value in given]
    if len(values) != len(prompts):
        what = f"returned {len(values)} rewards for {len(prompts)} completions"
        raise origin.error(what, "It must return one number or None for each completion.", RewardError)
    bad = [i for i, value in enumerate(given) if value is not None and not _is_finite(value)]
    if bad:
        raise origin.error(
            f"returned {_shown(given[bad[0]])} for {len(bad)} of {len(values)} completions; the first belongs to the "
            f"prompt {_shown(prompts[bad[0]])!r}",
            "It must return a finite number for each completion, or None for a completion that it cannot score.",
            RewardError,
        )
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # not a number, or a tensor of several
        return False


def _shown(value: Any) -> str:
    return str(value)[:200]


# ---- Calls that may hang ---------------------------------------------------------------------------------


class _Expired(BaseException):
    """Raised in a call that has timed out; no ``except Exception`` in it may swallow this."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, so that a client's open connections stay usable from one call to the next.

    In a thread of its own: a notebook already runs a loop in the main one. A daemon does not keep the interpreter
    from exiting.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


class AsyncCall:
    """An awaitable from a reward function, scheduled on the loop of all asynchronous calls."""

    def __init__(self, origin: Origin, awaitable: Awaitable[Any]) -> None:
        self.origin, self._given = origin, time.monotonic()
        self.began: float | None = None  # set in the loop's thread
        self.ended = False  # likewise; the loop may come to another call before it passes the result on
        self._future = asyncio.run_coroutine_threadsafe(self._run(awaitable), _loop())

    async def _run(self, awaitable: Awaitable[Any]) -> Any:
        self.began = time.monotonic()  # not before: another call may have blocked the loop until now
        try:
            return await awaitable
        finally:
            self.ended = True

    def result(self) -> Any:
        """The function's return value.

        Raises:
            Exception: What it raised, attributed to its origin.
        """
        with self.origin.blamed("the call", RewardError):
            return self._future.result()

    def returned(self) -> bool:
        """Whether it has returned; raises as ``result`` does."""
        if not self._future.done():
            return False
        self.result()
        return True

    def left(self, seconds: float) -> float:
        """Seconds left until its timeout."""
        return (self.began or self._given) + seconds - time.monotonic()

    def cancel(self) -> None:
        """Cancel it, unless it has returned."""
        self._future.cancel()


def wait_for_all(calls: Sequence[AsyncCall], seconds: float | None) -> None:
    """Wait until all calls have returned, or one has raised.

    Raises:
        UserError, RewardError: One has timed out.
    """
    while waiting := [call for call in calls if not call.returned()]:
        running = [call for call in waiting if not call.ended]
        left = seconds
        if seconds is not None and running:
            left = min(call.left(seconds) for call in _begun(running) or running)
        if left is not None and left <= 0:
            _check_time(waiting, seconds)
        else:
            futures = [call._future for call in waiting]
            concurrent.futures.wait(futures, left, return_when=concurrent.futures.FIRST_COMPLETED)


def _check_time(waiting: Sequence[AsyncCall], seconds: float) -> None:
    """Name the calls that have timed out; if a call blocks the loop, all that may be that call."""
    blocked = _is_blocked()
    waiting = [call for call in waiting if not call.ended]
    begun = _begun(waiting)
    late = [call for call in begun or waiting if call.left(seconds) <= 0]
    if late and blocked:
        late = begun or waiting
    if late and (blocked or begun):
        who = "" if not blocked else "An earlier call" if not begun else "One of them" if begun[1:] else "It"
        raise _timed_out([call.origin for call in late], seconds, blocks=who)


def _begun(calls: Sequence[AsyncCall]) -> list[AsyncCall]:
    """Those that the loop has started: the others' time does not count yet."""
    return [call for call in calls if call.began]


def _is_blocked() -> bool:
    """Whether a call blocks the event loop."""
    answered = threading.Event()
    _loop().call_soon_threadsafe(answered.set)
    return not answered.wait(_ANSWER_SECONDS)


def _timed_out(origins: Sequence[Origin], seconds: float, blocks: str = "") -> TrlRlaifError:
    """The error that names functions that timed out, at the first one's location, and what ``blocks`` the loop."""
    one = len(origins) == 1
    named = replace(origins[0], who=" and the ".join(origin.who for origin in origins))
    fix = _FIX.format("it waits" if one else "they wait")
    if blocks:
        fix = f"{_BLOCKED.format(blocks)} {fix}"
    return named.error(("has " if one else "have ") + _LATE.format(seconds), fix, RewardError)


@contextmanager
def named_when_it_hangs(origin: Origin, seconds: float | None) -> Iterator[None]:
    """Interrupt a call in this thread that has not returned in time.

    The call stays in this thread: gradient mode, the current GPU and signal handlers, on which functions rely, belong
    to a thread. A watcher logs the function's name, then interrupts the main thread as Ctrl-C does; a call in another
    thread, or deep in code that ignores signals, is named but not interrupted.

    Raises:
        UserError, RewardError: The call was interrupted.
    """
    if seconds is None:
        yield
        return
    main = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
    lock, state = threading.Lock(), {"done": False, "expired": False}

    def expire() -> None:
        with lock:
            if state["done"]:
                return
            state["expired"] = True
            say(f"Warning: the {origin.who} has {_LATE.format(seconds)}.")
            if main and hasattr(signal, "pthread_kill"):  # also wakes a call that waits for the network
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            elif main:
                _thread.interrupt_main()

    def interrupted(number: int, frame: Any) -> None:
        if state["expired"]:
            raise _Expired
        if callable(before):
            before(number, frame)

    before = signal.signal(signal.SIGINT, interrupted) if main else None
    watcher = threading.Timer(seconds, expire)
    watcher.daemon = True
    watcher.start()
    try:
        try:
            yield
        finally:
            with lock:
                state["done"] = True
            watcher.cancel()
    except _Expired:
        raise _timed_out([origin], seconds) from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
