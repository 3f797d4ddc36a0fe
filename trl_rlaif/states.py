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
        state: State dicts of a run's parts.
        path: The file.
        known: Other classes whose objects it may contain.

    Raises:
        UserError: It contains another object, which could not be read again.
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
    """Read a file of ``save_state`` to the CPU.

    Raises:
        RunError: The file is damaged, or contains objects of other classes, whose code is not run.
    """
    try:
        return _read(path, known)
    except Exception as error:  # a damaged archive may make torch raise anything
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
