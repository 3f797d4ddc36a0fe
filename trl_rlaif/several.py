"""Several processes of one run, as ``accelerate launch`` starts them: the first one alone writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from trl_rlaif.errors import UserError

# The one stage in which the processes share the work. Labeling is shared out otherwise: --shard.
TRAINED_TOGETHER = "rl"


def processes() -> int:
    """How many there are; read from what the launcher sets, without a word to the others."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes; true where there is one only."""
    return processes() == 1 or int(os.environ.get("RANK", 0)) == 0


def join() -> Any:
    """Accelerate's state of these processes; the first call joins them, on CPUs too where the launcher was told so."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")) if processes() > 1 else PartialState()


def wait() -> None:
    """Go on when all have come here."""
    if processes() > 1:
        join().wait_for_everyone()


def leave() -> None:
    """End what joins the processes. Left to the interpreter's end, its threads now and then abort the process."""
    if processes() > 1:
        wait()
        join().destroy_process_group()


def check(stages: Sequence[str], only: Sequence[str]) -> None:
    """Refuse what several processes would do over and over instead of sharing it.

    Args:
        stages: The recipe's.
        only: Those that were asked for.

    Raises:
        UserError: There are several processes, and another stage than rl would run.
    """
    if processes() == 1 or list(only) == [TRAINED_TOGETHER]:
        return
    before = [stage for stage in stages if stage in ("sft", "sample", "label", "reward")]
    first = f"Run --only {','.join(before)} with one process, then" if before else "Run"
    raise UserError(
        f"{processes()} processes share the stage {TRAINED_TOGETHER} alone.",
        fix=f"{first} --only {TRAINED_TOGETHER} with several, and --resume with one for what comes behind it.",
    )
