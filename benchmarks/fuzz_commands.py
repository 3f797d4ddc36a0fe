"""What `fuzz.py` runs of `trl-rlaif`, in its own process, and how that ended."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# How an exception ends that cli.main does not know.
RAW = ("Traceback (most recent call last)", "Add --debug behind trl-rlaif")
BAD = ("traceback", "hang", "died", "unnoticed")
# Where the processes find what a case damages.
BASES = "FUZZ_BASES"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def bases() -> Path:
    """The folder of the runs and models that cases are copied from."""
    return Path(os.environ[BASES])


def command(*arguments: object) -> tuple[int, str]:
    """Exit code of ``trl-rlaif ARGUMENTS`` in this process, and everything it said."""
    from trl_rlaif.cli import main

    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            sys.argv = ["trl-rlaif", *(["--debug"] if os.environ.get("FUZZ_DEBUG") else []), *map(str, arguments)]
            main()
            code: Any = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:  # what gets past cli.main
            code = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        file.seek(0)
        return code if isinstance(code, int) else 1, file.read().decode(errors="replace")


def judged(code: int, said: str, **more: Any) -> dict[str, Any]:
    """The outcome of a command that ended by itself, with what else is known of the case."""
    raw = any(mark in said for mark in RAW) or "\x1b" in said or (code and not said.strip())
    outcome = "traceback" if raw else "refused" if code else "accepted"
    return {"outcome": outcome, **more, **({"said": said[-3000:]} if raw else {})}
