"""docs/moving_in.md: its scripts run unchanged on tiny models; the stock one gives TRL's own numbers."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from helpers.pages import ROOT, Reader, python_blocks

from trl_rlaif import PPOConfig

pytestmark = pytest.mark.trl

PAGE = (ROOT / "docs" / "moving_in.md").read_text(encoding="utf-8")
GIVEN, STOCK, LEAN, LOOP, ANNEALED = python_blocks("docs/moving_in.md")
OURS = "from trl_rlaif import PPOConfig, PPOTrainer"
THEIRS = "from trl.experimental.ppo import PPOConfig, PPOTrainer"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run scripts of the page after its first block; returns the trainer."""
    reader = Reader(tmp_path, monkeypatch)

    def train(*scripts):
        names = {}
        torch.manual_seed(0)
        for script in (GIVEN, *scripts):
            reader.run(script, names)
        return names["trainer"]

    return train


def _updates(trainer):
    return [row for row in trainer.state.log_history if "objective/scores" in row]


def test_the_stock_script_runs_with_only_its_import_line_changed(train, tmp_path, capsys):
    trainer = train(STOCK)
    assert len(_updates(trainer)) == 4 and (tmp_path / "ppo" / "config.json").exists()
    assert all(math.isfinite(row["loss/policy_avg"]) for row in _updates(trainer))
    assert "What is a fox?" in capsys.readouterr().out


def test_the_stock_script_gives_trls_numbers(train):
    pytest.importorskip("trl.experimental.ppo", reason="TRL has none since 1.13", exc_type=ImportError)
    assert STOCK.count(OURS) == 1
    ours, theirs = _updates(train(STOCK)), _updates(train(STOCK.replace(OURS, THEIRS)))
    # The random stream is the same until the first update, which shuffles minibatches from another one.
    for name in ("objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward", "lr", "episode"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-5), name
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("script", [LEAN, LOOP], ids=["lean", "loop"])
def test_the_shorter_scripts_run(train, script):
    trainer = train(script)
    assert len(_updates(trainer)) == 4 and all(math.isfinite(row["loss/value_avg"]) for row in _updates(trainer))


def test_an_overridden_step_changes_the_score(train):
    plain, annealed = _updates(train(LOOP)), _updates(train(LOOP, ANNEALED))
    assert annealed[0]["objective/scores"] != pytest.approx(plain[0]["objective/scores"])


def test_the_tables_fields_exist():
    ours = {field.name for field in dataclasses.fields(PPOConfig)}
    table = PAGE.split("| 0.11 | here |")[1].split("```")[0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| `")]
    same = [row for row in rows if row[2].strip() == "the same"]
    for row in rows:
        cells = row[1] if row in same else row[2]
        names = set(re.findall(r"`(\w+)`", cells))
        names -= {"adapter", "trunk", "ref_model", "train_dataset", "prompt", "input_ids"}
        assert names <= ours, names - ours
