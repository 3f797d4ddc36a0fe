"""The user's Ctrl-C, as opposed to third-party code that raises the same exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_listening = False


class CtrlC(KeyboardInterrupt):
    """Raised inside ``listening`` when the user presses Ctrl-C."""


@contextmanager
def listening() -> Iterator[None]:
    """Inside, raise ``CtrlC`` where Python would raise a plain KeyboardInterrupt."""
    global _listening
    handled = threading.current_thread() is threading.main_thread()
    if not handled or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # such as ignored with `&`
        yield
        return
    before, _listening = signal.signal(signal.SIGINT, _raise), True
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _listening = False


def _raise(number: int, frame: Any) -> None:
    raise CtrlC


def is_fault(error: BaseException) -> bool:
    """Whether the code that raised an error is to blame, also for errors that end the program, such as SystemExit.

    For a plain KeyboardInterrupt it is only inside ``listening``; elsewhere, the user may have caused it.
    """
    if isinstance(error, KeyboardInterrupt):
        return _listening and not isinstance(error, CtrlC)
    return isinstance(error, Exception | SystemExit | GeneratorExit)
