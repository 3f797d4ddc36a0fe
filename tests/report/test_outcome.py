"""The last lines of a run: results, doubts and next steps."""

from __future__ import annotations

from helpers.report_pages import make_run, set_results

from trl_rlaif.report.outcome import outcome
from trl_rlaif.report.run_data import read_run


def test_result_doubts_and_next_step(tmp_path):
    folder = make_run(tmp_path / "run")
    first, last = outcome(read_run(folder), "runs/my run")
    assert (
        "the win rate over the initial policy is 63.7% (interval 54.8% to 71.7%): preferred over the initial" in first
    )
    assert "trl-rlaif rate 'runs/my run'" in last and "trl-rlaif export 'runs/my run' --what policy" in last
    set_results(folder, lambda r: r.update(warnings=[f"doubt {i}" for i in range(5)]))
    _, doubts, _ = outcome(read_run(folder), "x")
    assert doubts == ("Before you trust these results:\n- doubt 0\n- doubt 1\n- doubt 2\n- and 2 more in the report")


def test_a_run_of_labels_alone(tmp_path):
    folder = make_run(tmp_path / "run")
    set_results(folder, lambda r: [r.pop(stage) for stage in ("reward", "rl", "evaluate")])
    lines = outcome(read_run(folder), "x")
    assert lines[0].startswith("The judge judge-a labeled 598 of 612 pairs.") and lines[-1].startswith(
        "Next: read some"
    )


def test_a_run_without_evaluation(tmp_path):
    folder = make_run(tmp_path / "run")
    set_results(folder, lambda r: r.pop("evaluate"))
    lines = outcome(read_run(folder), "x")
    assert lines[0].startswith("PPO ran 12 updates") and "evaluate the policy" in lines[-1]
