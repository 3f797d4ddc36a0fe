"""Import the modules of benchmarks/gpu, which are scripts in one folder, in tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
# Other tests may have imported other modules under these names.
_NAMES = ("models", "ppo", "ablation", "sides", "reward")


@pytest.fixture
def sides(monkeypatch):
    """The module that measures one side; while it is in use, its neighbors can be imported too."""
    for folder in (GPU.parent, GPU):
        monkeypatch.syspath_prepend(str(folder))
    for name in _NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("sides")
    for name in _NAMES:
        sys.modules.pop(name, None)
