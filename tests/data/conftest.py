"""Data files for the tests in this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a file and returns its path."""

    def write(*rows: dict, name: str = "f.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
