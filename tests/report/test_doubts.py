"""Claims that the report does not make: a preference from few wins, from a judge not asked, or from rounding."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from helpers.report_pages import make_run, part, read, set_results
from scipy.stats import binom

from trl_rlaif.report.build import write_report
from trl_rlaif.report.figures import curve
from trl_rlaif.report.formatting import preferred
from trl_rlaif.report.plots import Panel, _legend_columns, curves
from trl_rlaif.report.summary import sign_test, win_rate_measure


@pytest.mark.parametrize(("wins", "losses"), [(4, 0), (0, 0), (9, 1), (13, 24), (96, 52)])
def test_the_sign_test_counts_what_is_at_least_as_unlikely(wins, losses):
    n = wins + losses
    exact = sum(p for k in range(n + 1) if (p := binom.pmf(k, n, 0.5)) <= binom.pmf(wins, n, 0.5) * (1 + 1e-9))
    assert sign_test({"wins": wins, "ties": 8, "losses": losses}) == pytest.approx(exact, abs=1e-12)


def test_a_win_rate_by_four_wins_is_not_called_clear(tmp_path):
    few = {"win_rate": 2 / 3, "interval": [0.542, 0.792], "wins": 4, "ties": 8, "losses": 0}
    measure = win_rate_measure(few)
    assert (measure.tone, measure.detail) == ("unclear", "sign test p = 0.12")
    many = {"win_rate": 2 / 3, "interval": [0.542, 0.792], "wins": 40, "ties": 80, "losses": 0}
    assert win_rate_measure(many).tone == "good"
    folder = make_run(tmp_path / "run")
    set_results(folder, lambda r: r["evaluate"]["sets"]["held-out"].update(few, prompts=12))
    page = read(folder)
    assert "so few wins and losses may be due to chance (4 wins, 8 ties, 0 losses, sign test p = 0.12)" in page.text
    assert "Only 12 prompts of held-out were evaluated" in page.text
    assert ": preferred over the initial policy" not in page.text


@pytest.mark.parametrize(("p", "said"), [(0.5049, "no"), (0.4951, "no"), (0.51, "a"), (0.49, "b"), (1.0, "a")])
def test_what_is_shown_as_a_half_prefers_neither(p, said):
    assert preferred(p, "a", "b", "no") == said


def test_labels_that_no_judge_gave_are_not_called_a_judges(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [json.dumps({"id": i, "p": 0.9, "judge": "same"}) for i in range(10)]
    (folder / "labels.jsonl").write_text("\n".join(rows) + "\n")

    def change(results):
        results["label"].update(position_bias=None, mass=None, agreement=None, judge="same")
        results["evaluate"]["judge"] = "same"

    set_results(folder, change)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("label:\n", "label:\n  labeler: tinym\n"))
    page = read(folder)
    assert "The labeler tinym labeled 598 of 612 pairs." in page.text
    assert "as judge," not in page.text and "The same judge gave the labels" not in page.text
    assert "Labels of tinym" in page.text and "Labels of the judge" not in page.text


def test_rounding_is_drawn_flat_and_not_explained():
    noise = [(step, 1e-10 * (-1) ** step * step) for step in range(30)]
    figure = curve({"kl": noise}, "KL of one update", "Spikes mean much.", {"kl": "KL"}, least=1e-6)
    assert figure.caption == "No change beyond rounding." and figure.values == "0 → 0"
    low, high = figure.drawing.figure.axes[0].get_ylim()
    assert high - low >= 1e-5
    ratio = [(step, 0.999995 + 1e-7 * step) for step in range(30)]
    figure = curve({"ratio": ratio}, "Probability ratio", "", {"ratio": "ratio"}, least=1e-4)
    assert figure.drawing.figure.axes[0].yaxis.get_major_formatter().get_useOffset() is False
    real = curve({"kl": [(1, 0.0), (2, 0.02)]}, "KL of one update", "Spikes mean much.", {"kl": "KL"}, least=1e-6)
    assert real.caption == "Spikes mean much." and real.values == "0 → 0.020"


def test_a_legend_is_as_wide_as_its_plot(drawn):
    names = [f"a category with a name, {i}" for i in range(8)]
    lines = [(name, [(1, 0.0), (2, float(i))]) for i, name in enumerate(names)]
    figure = curves([Panel("", lines)], "by category").figure
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 8
    assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert _legend_columns(["a", "b", "c"]) == 3 and _legend_columns(names) == 1


def test_eight_categories_are_drawn(tmp_path):
    folder = make_run(tmp_path / "run")
    row = {"stage": "rl", "objective/scores": 0.1} | {f"reward/kind {i}": 0.1 for i in range(8)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": s}) + "\n" for s in (1, 2)))
    assert "Shows the first" not in read(folder).text


def test_the_first_curves_are_four_and_the_others_folded(tmp_path):
    text = part(read(make_run(tmp_path / "run")), "Reinforcement learning", "Win rates by judge")
    order = [text.index(name) for name in ("Score versus KL", "KL to the reference", "Response length", "1 more curve")]
    assert order == sorted(order) and text.index("Policy loss") > order[-1]


def test_exported_plots_have_titles(tmp_path, drawn):
    folder = make_run(tmp_path / "run")
    write_report(folder)
    root = ET.fromstring((folder / "report/score-versus-kl.svg").read_bytes())
    assert "Score versus KL" in [element.text for element in root.iter() if element.tag.endswith("text")]
    top = float(root.get("viewBox").split()[1])
    assert top < 0 and (folder / "report/score-versus-kl.png").stat().st_size > 1000


def test_the_markdown_says_the_same_in_short(tmp_path):
    folder = make_run(tmp_path / "run", text="*x* <script>")
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert text.startswith("# tiny\n")
    row = "| held-out | 160 | win rate over the initial policy | 63.7% | 54.8% to 71.7% | preferred over the initial"
    assert row in text
    assert "| rl | done | 12 updates, 3,840 responses" in text and "    trl-rlaif run tiny --set run.seed=7" in text
    set_results(folder, lambda r: r.update(warnings=["a *bold* <b>claim</b> | here"]))
    write_report(folder)
    assert "- a \\*bold\\* \\<b\\>claim\\</b\\> \\| here" in (folder / "report.md").read_text()
