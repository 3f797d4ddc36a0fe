"""The report's section on reward model scores: densities, calibration, the table, and the regulator's alarms."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from helpers.report_pages import HOSTILE, Page, assert_only_our_script, make_run, part, read, set_results

from trl_rlaif.evaluation import category_figures
from trl_rlaif.pipeline.work import reward
from trl_rlaif.report.run_data import ScoredPair
from trl_rlaif.report.score_figures import MAX_RIDGES, density, largest_categories, reliability_bins

pytestmark = pytest.mark.usefixtures("drawn")

TRANSFORMED = ("chosen_after", "rejected_after")


def scored_rows(count=60, categories=("code", "chat"), seed=1):
    """Rows of reward_scores.jsonl: category means are far apart, and close together after the transforms."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        place = i % len(categories)
        chosen, rejected = (draw.gauss(3 * place + shift, 1) for shift in (0.5, -0.5))
        row = {"category": categories[place], "p": 0.9, "chosen": chosen, "rejected": rejected}
        rows.append(row | dict(zip(TRANSFORMED, (chosen - 3 * place, rejected - 3 * place), strict=True)))
    return rows


def plain(rows):
    return [{key: value for key, value in row.items() if key not in TRANSFORMED} for row in rows]


def put(folder, rows):
    """Write both outputs of the stage reward: its rows, and its numbers in results.json."""
    (folder / "reward_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    categories = [row["category"] for row in rows] * 2

    def figures(first, second):
        return category_figures([row[first] for row in rows] + [row[second] for row in rows], categories)

    names = {row["category"] or "(none)" for row in rows}
    numbers = {
        "ece": 0.0625,
        "ece_against": "labels",
        "scores": figures("chosen", "rejected") | {"accuracy": dict.fromkeys(names, 0.875)},
    }
    numbers["transformed"] = figures(*TRANSFORMED) if all(TRANSFORMED[0] in row for row in rows) else None
    set_results(folder, lambda results: results["reward"].update(numbers))


@pytest.fixture
def folder(tmp_path):
    """A run without other plots, which are slow."""
    folder = make_run(tmp_path / "run")
    for drawn in folder.glob("*.jsonl"):
        drawn.unlink()
    return folder


def shown(page):
    return part(page, "Reward model", "Reinforcement learning")


def drawings(page):
    return [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]


def pairs_of(*rows):
    return [ScoredPair(category, p, None, (chosen, rejected), None) for category, p, chosen, rejected in rows]


# ---- Densities ------------------------------------------------------------------------------------------


def test_a_density_is_the_sum_of_its_kernels():
    draw = random.Random(3)
    values = [draw.gauss(2, 5) for _ in range(50)]
    width = statistics.stdev(values) * len(values) ** -0.2
    line = density(values, (min(values), max(values)))
    assert line[0][0] == pytest.approx(min(values) - 3 * width) and line[-1][0] == pytest.approx(
        max(values) + 3 * width
    )
    for score, found in line[::20]:
        kernels = [math.exp(-0.5 * ((score - value) / width) ** 2) for value in values]
        assert found == pytest.approx(sum(kernels) / (len(values) * width * math.sqrt(2 * math.pi)))


def test_few_scores_are_counted_in_bars():
    line = density([0.0, 0.1, 2.4], (0.0, 2.4))
    heights = [line[i][1] for i in range(1, len(line) - 1, 2)]
    assert [h * 3 * 0.1 for h in heights] == pytest.approx([1, 1] + [0] * 21 + [1])
    assert line[0] == (0.0, 0.0) and line[-1] == (pytest.approx(2.4), 0.0)


@pytest.mark.parametrize("values", [[0.0], [5.0] * 100, [-1e30] * 3, [1e-300, 2e-300] * 20, [1e9, 1e9 + 0.1] * 20])
def test_scores_that_are_all_alike_stand_at_their_place(values):
    line = density(values, (min(values), max(values)))
    highest = max(line, key=lambda point: point[1])
    assert 0 < highest[1] < math.inf
    step = (line[-1][0] - line[0][0]) / 24
    assert abs(highest[0] - values[0]) <= 1.01 * step


def test_small_categories_are_drawn_together():
    sizes = {f"c{i}": 12 - i for i in range(11)}
    pairs = pairs_of(*((name, 1.0, 1.0, 0.0) for name, size in sizes.items() for _ in range(size)))
    drawn = largest_categories(pairs)
    assert list(drawn) == [f"c{i}" for i in range(7)] + ["other (4 categories)"] and len(drawn) == MAX_RIDGES
    assert [len(found) for found in drawn.values()] == [12, 11, 10, 9, 8, 7, 6, 5 + 4 + 3 + 2]
    assert list(largest_categories([pair for pair in pairs if pair.category < "c8" and pair.category != "c10"])) == [
        f"c{i}" for i in range(8)
    ]


# ---- Calibration ----------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_bins_count_who_was_right():
    rows = [("a", 1.0, 0.5, 0.0), ("a", 0.7, 0.0, 0.5), ("b", 0.2, 0.0, 0.45), ("b", 1.0, 3.0, -3.0), ("b", 0.5, 9, 0)]
    confidence = (2 * sigmoid(0.5) + sigmoid(0.45)) / 3
    (first, second), asked = reliability_bins(pairs_of(*rows))
    assert not asked  # so a label of 0.7 is right 7 times in 10
    assert first == pytest.approx((confidence, (1.0 + 0.3 + 0.8) / 3, 3))
    assert second == pytest.approx(((sigmoid(6) + sigmoid(9)) / 2, 0.75, 2))
    people = [True, False, False, None, None]
    (only,), asked = reliability_bins([replace(pair, human=h) for pair, h in zip(pairs_of(*rows), people, strict=True)])
    assert asked and only == pytest.approx((confidence, 1.0, 3))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_bins_give_the_ece_of_the_results(share):
    draw = random.Random(5)
    rows = (("a", draw.choice((0.1, 0.5, 0.9)), draw.gauss(0, 2), draw.gauss(0, 2)) for _ in range(300))
    pairs = [replace(pair, human=draw.random() < 0.7 if draw.random() < share else None) for pair in pairs_of(*rows)]
    bins, asked = reliability_bins(pairs)
    held_out = {"p": [pair.p for pair in pairs], "human": [pair.human for pair in pairs]}
    expected = reward._calibration([sigmoid(pair.before[0] - pair.before[1]) for pair in pairs], held_out)
    total = sum(n for _, _, n in bins)
    assert (expected["ece_against"], expected["ece_pairs"]) == ("people" if asked else "labels", total)
    assert asked == (share > 0) and total < 200 if asked else total == 300
    ece = sum(n / total * abs(right - confidence) for confidence, right, n in bins)
    assert ece == pytest.approx(expected["ece"], abs=1e-12)


def test_equal_scores_are_half_right_and_far_ones_do_not_overflow():
    bins, _ = reliability_bins(pairs_of(("a", 1.0, 2.0, 2.0), ("a", 1.0, 1e30, -1e30), ("a", 1.0, -1e30, 1e30)))
    assert bins == [(0.5, 0.5, 1), (1.0, 0.5, 2)]
    assert reliability_bins([ScoredPair("a", None, None, (1.0, 0.0), None)]) == ([], False)


# ---- The page -------------------------------------------------------------------------------------------


def test_the_page_shows_scores_before_and_after(folder):
    rows = scored_rows()
    put(folder, rows)
    page = read(folder)
    text = shown(page)
    assert drawings(page)[:3] == [
        "Scores before the transforms of 60 held-out pairs, by category",
        "Scores after the transforms of 60 held-out pairs, by category",
        "Agreement of the reward model with the labels, by its confidence, on 60 held-out pairs: ECE 0.062",
    ]
    before, after = (
        [row[a] for row in rows] + [row[b] for row in rows] for a, b in (("chosen", "rejected"), TRANSFORMED)
    )

    def relative(values):
        means = [statistics.fmean(values[place::2]) for place in (0, 1)]
        return f"{statistics.pstdev(means) / statistics.pstdev(values):.3f}"

    assert f"{relative(before)} times that of all scores before the reward transforms" in text
    assert f"and {relative(after)} times after them" in text
    assert float(relative(after)) < 0.3 < float(relative(before))
    assert "Category Pairs Accuracy Mean before Std before Mean after Std after" in text
    numbers = [f(values[1::2]) for values in (before, after) for f in (statistics.fmean, statistics.pstdev)]
    expected = " ".join(f"{x:.{3 if abs(x) < 1 else 2}f}".replace("-", "\u2212") for x in numbers)
    assert f"chat 30 87.5% {expected}" in text


def test_without_transforms_there_is_one_drawing_of_the_scores(folder):
    put(folder, plain(scored_rows()))
    page = read(folder)
    assert [title.split(" of 60")[0] for title in drawings(page)[:2]] == [
        "Scores",
        "Agreement of the reward model with the labels, by its confidence, on 60 held-out pairs: ECE 0.062",
    ]
    text = shown(page)
    assert "Category Pairs Accuracy Mean Std chat 30" in text and "transforms" not in text and "after" not in text


@pytest.mark.parametrize("transforms", [True, False])
@pytest.mark.parametrize(
    "rows",
    [
        scored_rows(60, ("only",)),
        scored_rows(60, (None,)),
        scored_rows(2),
        scored_rows(1),
        scored_rows(90, [f"category {i}" for i in range(30)]),
        [row | dict.fromkeys(("chosen", "rejected", *TRANSFORMED), 1.5) for row in scored_rows()],
        [row | {"p": 0.5} for row in scored_rows(4)],
    ],
    ids=["one category", "none", "two pairs", "one pair", "many", "all equal", "ties"],
)
def test_small_and_degenerate_data_give_a_page(folder, rows, transforms):
    put(folder, rows if transforms else plain(rows))
    page = read(folder)
    assert "nan" not in page.text.lower() and "None" not in page.text
    assert len([title for title in drawings(page) if "held-out pair" in title]) == 2 + transforms
    assert "no category 60 87.5%" in shown(page) or rows[0]["category"] is not None


def test_a_folder_from_before_shows_nothing_of_it(folder):
    bare = read(folder).text
    put(folder, scored_rows(4))
    (folder / "reward_scores.jsonl").unlink()
    assert read(folder).text == bare and "Scores of held-out pairs" not in bare


def test_results_from_before_give_the_drawings_alone(folder):
    put(folder, scored_rows(4))
    set_results(folder, lambda results: [results["reward"].pop(key) for key in ("ece", "scores", "transformed")])
    page = read(folder)
    assert len([title for title in drawings(page) if "held-out pair" in title]) == 3
    assert "Std" not in shown(page) and "relative spread" not in shown(page) and "ECE" not in page.text


def test_rows_and_numbers_of_another_shape_do_not_stop_the_report(folder):
    put(folder, scored_rows(4))
    odd = [{}, {"chosen": "x", "rejected": 1}, {"chosen": 1e300, "rejected": 1}, {"category": ["x"], "chosen": 1}]
    odd += [{"category": {"a": 1}, "p": 7, "chosen": 1, "rejected": 0, "chosen_after": None, "rejected_after": 2}]
    with (folder / "reward_scores.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in odd) + "[1]\n")
        file.write('{"category": "a", "p": NaN, "chosen": NaN, "rejected": 1}\n')
    shape = {"scores": {"categories": {"code": 3, "b": {"n": "x"}}, "accuracy": [1], "relative_spread": "y"}}
    set_results(folder, lambda results: results["reward"].update(shape, transformed=[1], ece={}))
    page = read(folder)
    assert "1 line of reward_scores.jsonl could not be read" in page.text
    assert any("of 5 held-out pairs" in title for title in drawings(page))


def test_hostile_category_names_stay_text(folder):
    put(folder, scored_rows(8, (HOSTILE, HOSTILE[:20], "$\\frac$ </svg><b>")))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"stage": "rl", "step": 3, f"regulator/{HOSTILE}/drift": 1.0}) + "\n"
    )
    page = read(folder)
    assert page.text.count("<script>alert(1)</script>") >= 2, "in the table and in the warning"
    assert page.text.count("$\\frac$ </svg><b>") == 3, "beside both drawings' rows, and in the table"
    assert_only_our_script(page)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert Page(source).text == page.text and read(folder).text == page.text


# ---- The regulator's alarms -----------------------------------------------------------------------------


def test_drifting_categories_are_named_with_their_first_step(folder):
    long = "a/kind " + "x" * 150
    drifts = {4: ("code", 0.0), 5: ("code", 1.0), 6: ("code", 1.0), 7: (long, 1.0), 8: ("chat", 0.0)}
    rows = [{"stage": "rl", "step": step, f"regulator/{name}/drift": on} for step, (name, on) in drifts.items()]
    rows += [{"stage": "reward", "step": 1, "regulator/chat/drift": 1.0}]
    rows += [{"stage": "rl", "step": 9, "regulator/chat/mean": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = part(read(folder), "Before you trust these results", "What was run")
    assert f"on prompts of code (from step 5), {long} (from step 7): it may be exploiting" in text
    assert "chat" not in text


def test_without_an_alarm_there_is_no_warning(folder):
    (folder / "metrics.jsonl").write_text('{"stage": "rl", "step": 1, "regulator/code/drift": 0.0}\n')
    assert "No warnings" in read(folder).text


def test_of_many_drifting_categories_some_are_counted(folder):
    row = {"stage": "rl", "step": 2} | {f"regulator/c{i:02}/drift": 1 for i in range(15)}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text = part(read(folder), "Before you trust these results", "What was run")
    assert "c11 (from step 2), 3 more: it may" in text
