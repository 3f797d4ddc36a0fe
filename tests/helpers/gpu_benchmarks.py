"""The modules of benchmarks/gpu, which are scripts beside each other, for tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
# Names that other tests may have given to other modules.
_NAMES = ("models", "ppo", "ablation", "sides", "reward")


@pytest.fixture
def sides(monkeypatch):
    """The module that measures a side; inside, its neighbours can be imported too."""
    for folder in (GPU.parent, GPU):
        monkeypatch.syspath_prepend(str(folder))
    for name in _NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("sides")
    for name in _NAMES:
        sys.modules.pop(name, None)
