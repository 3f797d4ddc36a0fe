"""Work divided among processes. Run as a script (tests/ on PYTHONPATH), this is one of several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.processes import write_result
from trl_rlaif import RunError, UserError, distributed

UNITS = "abcdefg"


def _shared() -> dict[str, Any]:
    """The results for seven units, and the units this process computed, inside and outside of ``dividing``."""
    computed: list[str] = []

    def compute(unit: str) -> str:
        computed.append(unit)
        return unit.upper()

    with distributed.dividing():
        inside = list(distributed.divided(UNITS, compute))
    mine = list(computed)
    outside = list(distributed.divided(UNITS, compute))
    return {"found": inside, "mine": mine, "outside": outside, "all": computed[len(mine) :]}


def _told(rank: int) -> dict[str, Any]:
    """The items of the first process's iterator, and whether this process's own iterator was used."""
    asked: list[int] = []

    def items() -> Iterator[int]:
        asked.append(rank)
        yield from (rank, rank + 10, rank + 20)

    with distributed.dividing():
        told = list(distributed.from_first(items))
    own = list(distributed.from_first(items))
    return {"told": told, "asked": asked, "own": own, "agreed": distributed.agreed(lambda: rank)}


def _failing(act: Callable[[], Any]) -> tuple[str, str]:
    try:
        with distributed.dividing():
            act()
    except (RunError, UserError) as error:
        return type(error).__name__, str(error)
    return "", ""


def _failed(rank: int) -> dict[str, Any]:
    def refuse(unit: str) -> str:
        if unit == "e":  # in the second round, by the second of three processes
            raise UserError("No e.", fix="Take another letter.")
        return unit

    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("by zero") if rank == 0 else AssertionError("asked")

    seen: list[str] = []
    return {
        "unit": _failing(lambda: seen.extend(unit for unit, _ in distributed.divided(UNITS, refuse))),
        "seen": seen,
        "first": _raised(lambda: list(distributed.from_first(broken))),
    }


def _raised(act: Callable[[], Any]) -> str:
    try:
        with distributed.dividing():
            act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    rank = distributed.join().process_index
    write_result(Path(sys.argv[1]), {"shared": _shared(), "told": _told(rank), "failed": _failed(rank)})
