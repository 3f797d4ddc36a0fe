"""Finished runs are compared on the prompts that they share."""

from __future__ import annotations

import json

import pytest
from helpers.report_pages import HOSTILE, Page, assert_only_our_script, make_run
from scipy.stats import binomtest

from trl_rlaif.cli import app
from trl_rlaif.errors import UserError
from trl_rlaif.experiments.runs import compare_runs, described
from trl_rlaif.report.build import write_comparison
from trl_rlaif.report.figures import overlaid


def _samples(folder, p, prompts=40, text=""):
    rows = [
        {"set": "held-out", "id": i, "prompt": f"prompt {i}", "start": "a", "trained": f"b {text}", "p_trained": p(i)}
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
    p = binomtest(15, 15).pvalue  # only the second run wins on 15 of 40 prompts, only the first on none
    assert f"held-out: +{100 * 15 / 40:.1f} points of win rate (95% interval +" in text
    assert f"on 40 prompts, sign test p = {p:.2g}: a clear difference" in text
    assert "  rl.algorithm: ppo | grpo\n" in text and "run.name" not in text and "Note" not in text


def test_runs_that_are_alike(two):
    lines = described(compare_runs([two[0], two[0]]))
    assert lines[:2] == ["Settings that differ:", "  none"]
    assert lines[-1].startswith("  held-out: +0.0 points") and lines[-1].endswith("p = 1: no clear difference")


def test_judges_that_differ_are_named(two):
    results = json.loads((two[1] / "results.json").read_text())
    results["evaluate"]["judge"] = "another"
    (two[1] / "results.json").write_text(json.dumps(results))
    assert compare_runs(two).notes == [
        "the runs were measured by different judges, whose win rates cannot be compared."
    ]


def test_the_page_has_figures_settings_and_responses_of_all(two, tmp_path, capsys):
    results = json.loads((two[1] / "results.json").read_text())
    results["evaluate"]["sets"]["held-out"] |= {"win_rate": 0.55, "interval": [0.46, 0.64]}
    (two[1] / "results.json").write_text(json.dumps(results))
    app(["compare", *map(str, two), "--output", str(tmp_path / "page.html")], standalone_mode=False)
    assert capsys.readouterr().out.endswith(f"Page: {tmp_path / 'page.html'}\n")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert_only_our_script(page)
    assert "a and b On held-out, the win rate of b minus that of a is +37.5 points (interval +22.5" in page.text
    assert "a 160 prompts, 48 → 57 tokens 63.7% 54.8% to 71.7%" in page.text
    assert "b 160 prompts, 48 → 57 tokens 55.0% 46.0% to 64.0%" in page.text
    assert "rl.algorithm ppo grpo" in page.text and "All 40 prompts that each of them answered." in page.text
    assert [a["aria-label"].split(",")[0] for _, a in page.elements if a.get("class") == "plot"][1] == "RL curves"


def test_hostile_text_stays_text(tmp_path):
    folders = [make_run(tmp_path / name, text=HOSTILE, category=HOSTILE) for name in ("a", "b")]
    _samples(folders[0], lambda i: 0.9, text=HOSTILE)
    _samples(folders[1], lambda i: 0.9, text=HOSTILE)
    write_comparison(compare_runs(folders), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert_only_our_script(page)
    assert page.text.count("<script>alert(1)</script>") >= 40


def test_curves_lie_over_each_other(two, drawn):
    runs = compare_runs(two).runs
    runs[0].series["rl"] = {"objective/kl": [(1, 0.0), (2, 3.0)], "rollout/length": [(1, 9.0), (2, 8.0)]}
    runs[1].series["rl"] = {"kl": [(1, 0.1)], "completions/mean_length": [(1, 20.0)], "loss": [(1, 0.5)]}
    figure = overlaid(["a", "b"], runs).drawing.figure
    drawn_lines = {
        axes.get_title(loc="left"): [line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes
    }
    assert drawn_lines == {
        "KL to the reference, in nats": [[[1, 0], [2, 3]], [[1, 2]]],
        "Response length, in tokens": [[[1, 9], [2, 8]], [[1, 20]]],
        "Loss": [[], [[1, 0.5]]],
    }
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_the_page_is_no_other_file(two):
    with pytest.raises(UserError, match=r"ends in \.html"):
        app(["compare", *map(str, two), "--output", str(two[0] / "results.json")], standalone_mode=False)
    assert json.loads((two[0] / "results.json").read_text())["evaluate"]


@pytest.mark.parametrize(
    ("paths", "digests", "told"),
    [
        (("/a/p.jsonl", "/b/p.jsonl"), "xx", None),
        (("/a/p.jsonl", "/b/p.jsonl"), "xy", ["/a/p.jsonl", "/b/p.jsonl"]),
        (("p.jsonl", "p.jsonl"), "xy", ["p.jsonl (xxxxxxxx)", "p.jsonl (yyyyyyyy)"]),
        (("p.jsonl", "p.jsonl"), "x", None),
        (("/a/p.jsonl", "/b/p.jsonl"), "", ["/a/p.jsonl", "/b/p.jsonl"]),
    ],
)
def test_a_file_is_its_content(two, paths, digests, told):
    for folder, path in zip(two, paths, strict=True):
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("prompts: prompts.jsonl", f"prompts: {path}"))
    for folder, digest in zip(two, digests, strict=False):
        (folder / ".state").mkdir()
        files = {"data.prompts": {"path": "", "digest": digest * 12}}
        (folder / ".state/sample.json").write_text(json.dumps({"inputs": {"files": files}}))
    assert compare_runs(two).settings.get("data.prompts") == told


def test_judges_that_each_run_taught_are_different(two):
    for folder, right in zip(two, (0.8, 0.9), strict=True):
        (folder / "recipe.yaml").write_text(
            (folder / "recipe.yaml").read_text().replace("judge: same", "judge: taught")
        )
        results = json.loads((folder / "results.json").read_text())
        results["judge"] = {"sources": {"all": {"after": {"agreement": {"rate": right}}}}}
        (folder / "results.json").write_text(json.dumps(results))
    assert "different judges" in compare_runs(two).notes[0]
    assert not compare_runs([two[0], two[0]]).notes


def test_one_run_is_no_comparison(two):
    with pytest.raises(UserError, match="needs two runs"):
        compare_runs(two[:1])
