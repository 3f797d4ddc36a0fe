"""Plots of any number of points, and the curves of RL."""

from __future__ import annotations

import json

import pytest
from helpers.report_pages import make_run

from trl_rlaif.report.build import write_report
from trl_rlaif.report.figures import rl_part
from trl_rlaif.report.plots import score_over_kl
from trl_rlaif.report.run_data import read_run


@pytest.mark.parametrize("count", [1, 2, 4, 7, 11])
def test_the_way_of_score_over_kl_is_drawn_whatever_its_length(drawn, count):
    """With four points, the last one had an alpha of 1.0000000000000002, which matplotlib refuses."""
    assert score_over_kl([(0.1 * i, i % 3) for i in range(count)], "way") is not None


def test_other_curves_are_one_figure_over_the_same_steps(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    rows = [
        {"stage": "rl", "step": s, "objective/scores": s, "objective/kl": s, "rollout/length": s} for s in (1, 2, 3)
    ]
    rows[0] |= {"objective/entropy": 50.0, "loss/policy_avg": 0.5}
    rows[2] |= {"objective/entropy": 40.0, "lr": 1e-5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = rl_part(read_run(folder))["more"]
    assert [row[:2] for row in more.rows] == [
        ("Entropy", "50.00 → 40.00"), ("Policy loss", "0.500"), ("Learning rate", "1.00e−05")
    ]  # fmt: skip
    stack = more.drawing.figure.axes
    assert [axes.get_title(loc="left") for axes in stack] == ["Entropy", "Policy loss", "Learning rate"]
    assert stack[0].get_lines()[0].get_xydata().tolist() == [[1, 50], [3, 40]]
    assert len({axes.get_xlim() for axes in stack}) == 1 and len({axes.get_position().x0 for axes in stack}) == 1
    assert [axes.get_xlabel() for axes in stack] == ["", "", "step"]
    write_report(folder)
    assert b"More RL curves" in (folder / "report/more-rl-curves.svg").read_bytes()


def test_kl_and_entropy_of_trls_trainers_are_per_response(tmp_path):
    folder = make_run(tmp_path / "run")
    row = {
        "stage": "rl",
        "step": 1,
        "objective/scores": 0.5,
        "kl": 0.25,
        "entropy": 2.0,
        "completions/mean_length": 20.0,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 2, "kl": 0.5}) + "\n")
    found = rl_part(read_run(folder))
    headings = [figure.heading for figure in found["figures"]]
    assert headings == ["Score versus KL", "Score", "KL to the reference, in nats", "Response length, in tokens"]
    assert found["figures"][2].values == "5.00 → 10.00" and found["more"].rows[0][:2] == ("Entropy", "40.00 → 40.00")
