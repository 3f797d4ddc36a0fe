"""Every script in examples/ trains a tiny model."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest

from trl_rlaif.testing import save_tiny_model

pytestmark = pytest.mark.trl

EXAMPLES = {path.stem: path for path in (Path(__file__).resolve().parents[1] / "examples").glob("*.py")}
LOGGED = {  # metrics that show each script's own reward or loss
    "grpo_judge": "rewards/direct/mean",
    "dpo_ai_labels": "rewards/accuracies",
    "reward_soft_labels": "loss",
    "ppo_rubric": "objective/scores",
    "agent_transcripts": "loss",
}


def test_each_example_is_tested_and_short():
    assert EXAMPLES.keys() == LOGGED.keys()
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in EXAMPLES.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), length=2048)


@pytest.mark.parametrize("name", LOGGED)
def test_an_example_trains(name, model, tmp_path, monkeypatch):
    length = ["--episodes", "16"] if name == "ppo_rubric" else ["--max-steps", "2"]
    sure = ["--min-confidence", "0.5"] if name == "dpo_ai_labels" else []  # random weights are never confident
    arguments = [name, "--model", model, "--judge", model, "--output", str(tmp_path / "out"), *length, *sure]
    monkeypatch.setattr(sys, "argv", arguments)
    trainer = runpy.run_path(str(EXAMPLES[name]))["trainer"]
    logged = [row[LOGGED[name]] for row in trainer.state.log_history if LOGGED[name] in row]
    assert len(logged) == 2 and all(math.isfinite(value) for value in logged)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
