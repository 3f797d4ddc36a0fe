"""Runs `trl-rlaif` commands for `fuzz.py` in the same process, and classifies their outcomes."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# Output after an exception that cli.main does not handle.
RAW = ("Traceback (most recent call last)", "Add --debug behind trl-rlaif")
BAD = ("traceback", "hang", "died", "unnoticed")
# Environment variable with the folder of the files that cases damage.
BASES = "FUZZ_BASES"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def bases() -> Path:
    """The folder of runs and models that cases copy."""
    return Path(os.environ[BASES])


def command(*arguments: object) -> tuple[int, str]:
    """Exit code of ``trl-rlaif ARGUMENTS``, run in this process, and all of its output."""
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
        except BaseException:  # not handled by cli.main
            code = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        file.seek(0)
        return code if isinstance(code, int) else 1, file.read().decode(errors="replace")


def judged(code: int, said: str, **more: Any) -> dict[str, Any]:
    """The outcome of a command that ended by itself, with further details of the case."""
    raw = any(mark in said for mark in RAW) or "\x1b" in said or (code and not said.strip())
    outcome = "traceback" if raw else "refused" if code else "accepted"
    return {"outcome": outcome, **more, **({"said": said[-3000:]} if raw else {})}
