"""Imports functions named in a recipe."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from trl_rlaif.errors import UserError
from trl_rlaif.interrupts import is_fault


def load_function(name: str) -> Any:
    """Import a reward function from ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        UserError: It cannot be imported, or is not callable.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, attribute)
    except BaseException as error:  # anything that the user's module raises
        if not is_fault(error):
            raise
        raise UserError(
            f"The reward '{name}' cannot be imported: {type(error).__name__}: {error}",
            fix="Write package.module:function or path/to/file.py:function.",
        ) from error
    if not callable(function):
        raise UserError(f"The reward '{name}' is not a function.")
    return function
