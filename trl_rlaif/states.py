"""State dicts on disk, read without executing any code in the file."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_rlaif.errors import RunError, UserError


def save_state(state: Any, path: Path, known: Sequence[type] = ()) -> None:
    """Write tensors, numbers, texts, and lists, tuples and dicts of these.

    Args:
        state: What ``state_dict`` of the parts of a run gave.
        path: The file.
        known: Classes whose objects it may hold, too.

    Raises:
        UserError: It holds another object, which could not be read again.
    """
    torch.save(state, path)
    try:
        _read(path, known, mmap=True)
    except pickle.UnpicklingError as error:
        path.unlink()
        raise UserError(
            f"A checkpoint cannot hold this state: {_first_line(error)}",
            where=str(path),
            fix="In state_dict(), keep tensors, numbers, texts, lists and dicts, no objects of your own.",
        ) from error


def load_state(path: Path, known: Sequence[type] = ()) -> Any:
    """What ``save_state`` wrote, on the CPU.

    Raises:
        RunError: The file is damaged, or holds objects of other classes, whose code is not run.
    """
    try:
        return _read(path, known)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise RunError(
            f"The file is damaged, or not one that this project wrote: {_first_line(error)}",
            where=str(path),
            fix="Restore it. If you remove the checkpoint, the previous one is used.",
        ) from error


def _read(path: Path, known: Sequence[type], mmap: bool = False) -> Any:
    with torch.serialization.safe_globals(list(known)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
