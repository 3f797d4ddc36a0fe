"""docs/moving_in.md: its scripts run as they stand, on tiny models; the stock one gives TRL's own numbers."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_scorer

from trl_rlaif import PPOConfig
from trl_rlaif.testing import make_tokenizer, save_tiny_model

pytestmark = pytest.mark.trl

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "moving_in.md").read_text(encoding="utf-8")
GIVEN, STOCK, LEAN, LOOP, ANNEALED = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OURS = "from trl_rlaif import PPOConfig, PPOTrainer"
THEIRS = "from trl.experimental.ppo import PPOConfig, PPOTrainer"


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Tiny ones in place of what the page's first block gives."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    scorer = make_scorer(len(tokenizer))
    scorer.save_pretrained(tmp_path / "scorer")
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "bf16": False}
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    found = {
        "policy_model": save_tiny_model(tmp_path / "model"),
        "reward_model_path": str(tmp_path / "scorer"),
        "questions": [f"what is the {word}?" for word in "quick brown fox lazy dog capital city judge".split()],
        "settings": {**batch, **quiet, "learning_rate": 1e-3, "gradient_checkpointing": False},
    }
    names = {t.id for node in ast.parse(GIVEN).body if isinstance(node, ast.Assign) for t in node.targets}
    assert names == found.keys()
    return found


def _run(script, given):
    names = dict(given)
    torch.manual_seed(0)
    exec(compile(script, "moving_in.md", "exec", dont_inherit=True), names)
    return names["trainer"]


def _updates(trainer):
    return [row for row in trainer.state.log_history if "objective/scores" in row]


def test_the_stock_script_runs_with_only_its_import_line_changed(given, tmp_path, capsys):
    trainer = _run(STOCK, given)
    assert len(_updates(trainer)) == 4 and (tmp_path / "ppo" / "config.json").exists()
    assert all(math.isfinite(row["loss/policy_avg"]) for row in _updates(trainer))
    assert "what is the quick?" in capsys.readouterr().out


def test_the_stock_script_gives_trls_numbers(given):
    pytest.importorskip("trl.experimental.ppo", reason="TRL has none since 1.13", exc_type=ImportError)
    assert STOCK.count(OURS) == 1
    ours, theirs = _updates(_run(STOCK, given)), _updates(_run(STOCK.replace(OURS, THEIRS), given))
    # The same sampling stream until the first update; after it, minibatches are shuffled from another one.
    for name in ("objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward", "lr", "episode"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-5), name
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("script", [LEAN, LOOP], ids=["lean", "loop"])
def test_the_shorter_scripts_run(given, script):
    trainer = _run(script, given)
    assert len(_updates(trainer)) == 4 and all(math.isfinite(row["loss/value_avg"]) for row in _updates(trainer))


def test_an_overridden_step_changes_the_score(given):
    plain, annealed = _updates(_run(LOOP, given)), _updates(_run(LOOP + ANNEALED, given))
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
