"""Caches results that take seconds to compute and stay valid until a package changes, across commands."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl_rlaif.files import cache_dir, to_json, write_atomically

_FILE = "remembered.json"
# Maximum number of cached results; the oldest are removed first.
_MOST = 200


def remembered(question: Any, find: Callable[[], Any]) -> Any:
    """The result of ``find``, or its cached result for the same question with the same packages installed.

    Args:
        question: What the result depends on besides the packages; JSON-serializable.
        find: Its result is cached unless it is None; exceptions propagate and are not cached.
    """
    path = cache_dir() / _FILE
    key = hashlib.sha256(to_json([_installation(), question]).encode()).hexdigest()
    known = _read(path)
    if key not in known:
        answer = find()
        if answer is None:
            return None
        known = dict([*_read(path).items(), (key, answer)][-_MOST:])  # read again: another command may have added to it
        with suppress(OSError):  # without a writable cache, only time is lost
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, to_json(known))
    return known[key]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _installation() -> list[Any]:
    """A value that changes when a package is installed, upgraded or removed, or this one is edited."""
    packages = [found.name for place in sys.path for found in sorted(Path(place).glob("*.dist-info"))]
    own = max(file.stat().st_mtime_ns for file in Path(__file__).parent.rglob("*.py"))
    return [sys.version, packages, own]
