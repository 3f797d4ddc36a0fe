"""Ranking settings that `check` refuses, and GRPO and RLOO on comparisons within the group."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.recipes import run_cli, tiny_recipe, write_recipe

from trl_rlaif.files import read_lines
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.plugins import installed_plugins

REST = dict.fromkeys(("sample", "label", "reward", "evaluate", "report"))
GROUPS = {"algorithm": "grpo", "rewards": ["ranking"], "num_generations": 4}
SAMPLE = {"num_responses": 4, "keep_pairs": "all"}


@pytest.mark.parametrize(
    ("sections", "key", "what", "fix"),
    [
        (
            {**REST, "rl": {**GROUPS, "algorithm": "ppo", "num_generations": None}},
            "rewards",
            "The reward 'ranking' compares the responses to a prompt, and ppo scores each alone.",
            "Set rl.algorithm to grpo or rloo.",
        ),
        (
            {**REST, "rl": {**GROUPS, "selectors": ["prompt_selection"]}},
            "selectors",
            "The reward 'ranking' compares the responses to a prompt, which the pool of rl.selectors scores in parts.",
            "Leave out the selectors",
        ),
        (
            {"sample": SAMPLE, "label": {"labeler": "direct", "ranking": {"method": "tournament"}}},
            "ranking",
            "A tournament asks about one order at a time, and the labeler 'direct' has no option 'orders'.",
            "Set label.labeler to distilled, or label.ranking.method to all_pairs.",
        ),
    ],
)
def test_check_refuses_it_with_its_line(tiny_model, tmp_path, monkeypatch, capsys, sections, key, what, fix):
    if "rl" in sections:
        sections = sections | {"rl": {k: v for k, v in sections["rl"].items() if v is not None}}
    path = write_recipe(tmp_path, tiny_model, **sections)
    code, said = run_cli(monkeypatch, capsys, "check", path)
    lines = path.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))
    number += lines[number].strip() == "- ranking"
    assert code == 2 and what in said and fix in said and f"recipe.yaml:{number}" in said


def test_check_takes_rankings(tiny_model, tmp_path, monkeypatch, capsys):
    sections = {
        "sample": SAMPLE,
        "label": {"ranking": {"method": "tournament"}},
        "rl": GROUPS | {"rewards": ["reward"]},
    }
    assert run_cli(monkeypatch, capsys, "check", write_recipe(tmp_path, tiny_model, **sections))[0] == 0


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_group_is_rewarded_by_comparisons_within_it(tiny_model, tmp_path, algorithm):
    model = shutil.copytree(tiny_model, tmp_path / "roomy")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    labelers = [{"ranking": {"method": "all_pairs", "preamble": "detailed"}}]
    rl = {**GROUPS, "algorithm": algorithm, "labelers": labelers, "per_device_train_batch_size": 8}
    folder = run_recipe(tiny_recipe(tmp_path, str(model), **REST, rl=rl), installed_plugins(), tmp_path / "out")
    steps = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "rl" and "score/ranking" in row]
    assert len(steps) == 3
    for step in steps:
        assert step["score/ranking"] == pytest.approx(0, abs=1e-6)  # the mean over whole groups
        assert step["rewards/ranking/std"] > 0 and step["rollout/unscored"] == 0
