"""The same seed gives the same PPO run with every TRL version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ppo_metrics

from trl_rlaif.compat.ppo_trainer import OwnPPOTrainer
from trl_rlaif.compat.trl_ppo import BasePPOTrainer

pytestmark = pytest.mark.trl

# Written by tests/helpers/ppo_metrics.py on TRL 1.12.0, with TRL's PPOTrainer as the base, and torch 2.13.0 on a CPU.
# On the same machine, TRL 1.16.0 and --own-base gave bit-identical numbers.
EXPECTED = Path(__file__).parent / "ppo_metrics.json"


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The metrics with the installed TRL's base."""
    return ppo_metrics.run(str(tmp_path_factory.mktemp("trl")))


def _assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for run, updates in expected.items():
        assert len(found[run]) == len(updates) == 3
        for mine, theirs in zip(found[run], updates, strict=True):
            # Metrics added since then are not among them.
            assert {name: mine[name] for name in theirs} == pytest.approx(theirs, **tolerance), run


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="another torch rounds otherwise, and may sample so"
)
def test_every_version_gives_the_numbers_of_1_12(logged):
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    # In float32, another CPU may sum in another order.
    _assert_same(logged, expected["logged"], rel=1e-3, abs=1e-5)


@pytest.mark.skipif(BasePPOTrainer is OwnPPOTrainer, reason="TRL has no PPO trainer since 1.13")
def test_our_own_base_gives_the_numbers_of_trls(logged, tmp_path):
    file = tmp_path / "own.json"
    command = [sys.executable, ppo_metrics.__file__, str(file), "--own-base"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    own = json.loads(file.read_text(encoding="utf-8"))
    assert own["base"] == "OwnPPOTrainer"
    _assert_same(own["logged"], logged, rel=1e-6, abs=1e-7)
