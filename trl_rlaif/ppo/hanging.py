"""Calls of reward functions that may hang: an event loop for asynchronous ones, and a time limit for all."""

from __future__ import annotations

import _thread
import asyncio
import signal
import threading
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from typing import Any

from trl_rlaif.contracts import Origin, RewardError
from trl_rlaif.errors import TrlRlaifError
from trl_rlaif.progress import say

_WHAT = "has not returned after {:g} seconds, the limit that reward_timeout sets"
_FIX = "Find out what it waits for, or raise reward_timeout (null: no limit)."


class _Expired(BaseException):
    """Raised in a call whose time is up; no ``except Exception`` in it may swallow this."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, so that a client's open connections stay usable from one call to the next.

    In a thread of its own: a notebook already runs a loop in the main one. A daemon does not keep the interpreter
    from exiting.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def start(awaitable: Awaitable[Any]) -> Future:
    """Begin to await in the loop of all asynchronous calls."""

    async def waited() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(waited(), _loop())


def timed_out(origin: Origin, seconds: float) -> TrlRlaifError:
    """The error that names a function whose time is up."""
    return origin.error(_WHAT.format(seconds), _FIX, RewardError)


@contextmanager
def named_when_it_hangs(origin: Origin, seconds: float | None) -> Iterator[None]:
    """Interrupt a call of this thread that has not returned in time.

    The call stays in this thread: gradient mode, the current GPU and signal handlers, on which functions rely, belong
    to a thread. A watcher says the function's name, then interrupts the main thread as Ctrl-C does; a call in another
    thread, or deep in code that ignores signals, is named and not interrupted.

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
            say(f"Warning: the {origin.who} {_WHAT.format(seconds)}.")
            if main and hasattr(signal, "pthread_kill"):  # wakes a call that waits for the network, too
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
        raise timed_out(origin, seconds) from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
