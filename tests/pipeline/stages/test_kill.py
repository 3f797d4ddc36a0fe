"""Runs of every stage and algorithm, killed at any moment and resumed, are bit-identical to undisturbed ones."""

from __future__ import annotations

import random
import signal

import pytest
from helpers.killing import RECIPES, try_kills

pytestmark = pytest.mark.slow

KILLS = 2


@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_runs_end_as_undisturbed_ones(tiny_model, tmp_path, name):
    """The moments are drawn from the run's file changes; benchmarks/kills.py draws more of them."""
    found = try_kills(tmp_path / "runs", tiny_model, name, KILLS, random.Random(f"0 {name}"))
    assert found.failed == [] and found.differences == []
    assert len(found.kills) == KILLS and set(found.kills) <= {signal.SIGKILL, signal.SIGINT, signal.SIGTERM}
