"""Lists of the digests of a folder's files, which reveal missing or changed files."""

from __future__ import annotations

import json
from pathlib import Path

from trl_rlaif.files import digest_of, digests_in

FILE = "content.json"


def record(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder into that folder, which marks it as complete."""
    building = folder / f".{FILE}.building"
    building.unlink(missing_ok=True)  # a kill may have left it
    digests = {name: digest for name, digest in digests_in(folder).items() if name != FILE}
    building.write_text(json.dumps(digests, indent=1), encoding="utf-8")
    building.replace(folder / FILE)


def recorded(folder: Path) -> dict[str, str]:
    """The digests of a folder's files by relative path; {} if there is no list, or it is damaged."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def damaged(folder: Path) -> Path | None:
    """The first missing or changed file of a folder, or the list itself if it cannot be read; else None."""
    digests = recorded(folder)
    if not digests:
        return folder / FILE
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or digest_of(path) != digest:
            return path
    return None
