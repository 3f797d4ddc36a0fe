"""Interprocess locks on open files: ``flock`` where available (Linux, macOS), else on a byte of the file."""

from __future__ import annotations

import errno
import sys
import time
from typing import IO, Any

# On Windows, a locked byte cannot be read; this one is beyond any content.
_BYTE = 2**31 - 2


def lock(file: IO[Any], *, shared: bool = False, wait: bool = True) -> None:
    """Lock a file until it is closed.

    Args:
        shared: Allow other shared locks at the same time. Windows has none: there, the lock is exclusive.
        wait: Wait until it is free; otherwise, raise.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is False.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(_BYTE)
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EDEADLK):
                    raise
                if not wait:
                    raise BlockingIOError(*error.args) from None
            time.sleep(0.1)
    else:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
