"""Answers that take seconds to find and hold until a package changes, kept in the user's cache between commands."""

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
# Answers that are kept; the oldest go first.
_MOST = 200


def remembered(question: Any, find: Callable[[], Any]) -> Any:
    """What ``find`` returns, or what it returned to the same question with the same packages installed.

    Args:
        question: What decides the answer besides the packages, as JSON takes it.
        find: Its answer is kept unless it is None; what it raises passes through and is not kept.
    """
    path = cache_dir() / _FILE
    key = hashlib.sha256(to_json([_installation(), question]).encode()).hexdigest()
    known = _read(path)
    if key not in known:
        answer = find()
        if answer is None:
            return None
        known = dict([*_read(path).items(), (key, answer)][-_MOST:])  # read again: another command may have added to it
        with suppress(OSError):  # a cache that cannot be written costs time alone
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
    """What changes with every package that is installed, upgraded or removed, and with every edit of this one."""
    packages = [found.name for place in sys.path for found in sorted(Path(place).glob("*.dist-info"))]
    own = max(file.stat().st_mtime_ns for file in Path(__file__).parent.rglob("*.py"))
    return [sys.version, packages, own]
