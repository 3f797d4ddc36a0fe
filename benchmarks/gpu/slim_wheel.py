"""Removes a wheel's shared libraries except those with the given endings: slim_wheel.py WHEEL ENDING..."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def slim(path: Path, endings: tuple[str, ...]) -> None:
    """Rewrite a wheel and its RECORD without the other .so files."""
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith(".so") or name.endswith(endings)]
        files = {name: wheel.read(name) for name in names}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            if name.endswith(".dist-info/RECORD"):
                lines = data.splitlines(keepends=True)
                data = b"".join(line for line in lines if line.split(b",")[0].decode() in files)
            wheel.writestr(name, data)


if __name__ == "__main__":
    slim(Path(sys.argv[1]), tuple(sys.argv[2:]))
