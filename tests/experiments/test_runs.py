"""Finished runs side by side: by the same prompts, whatever else each of them evaluated."""

from __future__ import annotations

import json

import pytest
from helpers.report_pages import make_run
from scipy.stats import binomtest

from trl_rlaif.cli import app
from trl_rlaif.errors import UserError
from trl_rlaif.experiments.runs import compare_runs


def _samples(folder, p, prompts=40):
    rows = [
        {"set": "held-out", "id": i, "prompt": f"prompt {i}", "start": "a", "trained": "b", "p_trained": p(i)}
        for i in range(prompts)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def two(tmp_path):
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    _samples(folders[0], lambda i: 0.9 if i < 10 else 0.1)
    _samples(folders[1], lambda i: 0.9 if i < 25 else 0.1, prompts=50)
    path = folders[1] / "recipe.yaml"
    path.write_text(path.read_text().replace("algorithm: ppo", "algorithm: grpo").replace("name: tiny", "name: other"))
    return folders


def test_the_difference_is_of_shared_prompts(two, capsys):
    app(["compare", *map(str, two)], standalone_mode=False)
    text = capsys.readouterr().out
    p = binomtest(15, 15).pvalue  # on 15 of 40 prompts the second alone wins, on none the first alone
    assert f"held-out: +{100 * 15 / 40:.1f} points of win rate (95% interval +" in text
    assert f"on 40 prompts, sign test p = {p:.2g}: a clear difference" in text
    assert "  rl.algorithm: ppo | grpo\n" in text and "run.name" not in text and "Note" not in text


def test_runs_that_are_alike(two):
    lines = compare_runs([two[0], two[0]])
    assert lines[:2] == ["Settings that differ:", "  none"]
    assert lines[-1].startswith("  held-out: +0.0 points") and lines[-1].endswith("p = 1: no clear difference")


def test_judges_that_differ_are_named(two):
    results = json.loads((two[1] / "results.json").read_text())
    results["evaluate"]["judge"] = "another"
    (two[1] / "results.json").write_text(json.dumps(results))
    assert (
        compare_runs(two)[-1] == "Note: the runs were measured by different judges, whose win rates cannot be compared."
    )


def test_one_run_is_no_comparison(two):
    with pytest.raises(UserError, match="needs two runs"):
        compare_runs(two[:1])
