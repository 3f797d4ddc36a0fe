"""The report's section on rehearsal and forgetting: curves, the map of clusters, the tables and the warnings."""

from __future__ import annotations

import json

import pytest
from helpers.report_pages import HOSTILE, assert_only_our_script, make_run, part, read, set_results

pytestmark = pytest.mark.usefixtures("drawn")

HEADINGS = ("Rehearsal and forgetting", "Reward on held-out prompts, before and after")


@pytest.fixture
def folder(tmp_path):
    """A run without plots of other sections, which are slow."""
    folder = make_run(tmp_path / "run")
    for drawn in folder.glob("*.jsonl"):
        drawn.unlink()
    return folder


def put(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(cluster, score, prompt="what?", response="that", why="advantage: 1 of 9"):
    return {"prompt": prompt, "response": response, "score": score, "cluster": cluster, "why": why}


def points(clusters, of_each=3):
    return [
        {"x": c + 0.1 * i, "y": i / 7, "cluster": c, "chosen": i == 0, "prompt": "p"}
        for c in range(clusters)
        for i in range(of_each)
    ]


def drawings(page):
    return [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]


def test_without_data_there_is_no_such_part(folder):
    page = read(folder)
    assert HEADINGS[0] not in page.text
    assert not any(attributes.get("href") == "#forgetting" for _, attributes in page.elements)


def test_the_curves_of_each_set(folder):
    rows = [
        {"stage": "rl", "step": step, "forgetting/test/win_rate": 0.5 + step / 20, "forgetting/test/nll": 1 + step,
         "forgetting/forget/win_rate": 0.5 - step / 20, "forgetting/forget/nll": 2.0 + step, "time/forgetting": 3.0}
        for step in (0, 2, 4)
    ]  # fmt: skip
    put(folder, "metrics.jsonl", rows + [{"stage": "rl", "step": s, "rehearsal/nll": 3.0 - s} for s in (1, 2)])
    page = read(folder)
    assert any(attributes.get("href") == "#forgetting" for _, attributes in page.elements)
    text = part(page, *HEADINGS)
    assert "Win rate over the initial policy forget 0.500 → 0.300; test 0.500 → 0.700" in text
    assert "NLL of the initial policy's good answers forget 2.00 → 6.00; test 1.00 → 5.00" in text
    assert "NLL of rehearsed pairs 2.00 → 1.00" in text
    # Plotted metrics are not listed again; their time is.
    others = part(page, "Reinforcement learning", "Rehearsal and forgetting")
    assert "forgetting/forget" not in others and "time/forgetting 3.00 3.00 3 times" in others
    assert "rehearsal/nll" not in others


def test_the_table_of_rehearsed_pairs(folder):
    rows = [pair(0, 1.0), pair(1, 0.25, "which?", "this"), pair(1, 0.75, [{"role": "user", "content": "which one?"}],
            [{"role": "assistant", "content": "the best"}]), pair(None, None, "mine?", "yes", "given")]  # fmt: skip
    put(folder, "rehearsal.jsonl", rows)
    rehearsal = {"pairs": 4, "nll_first": 2.5, "nll_last": 1.25, "share_of_time": 0.0432}
    set_results(folder, lambda results: results["rl"].update(rehearsal=rehearsal))
    text = part(read(folder), *HEADINGS)
    assert "cluster 2 2 0.500 which one? the best cluster 1 1 1.00 what? that given 1 mine? yes" in text
    assert "pairs rehearsed 4 fraction of the updates' time 4.3% their NLL, first and last update 2.50 → 1.25" in text


def test_the_nll_of_the_evaluated_sets(folder):
    set_results(folder, lambda r: r["evaluate"]["sets"]["held-out"].update(nll_start=0.5, nll_trained=0.8125))
    assert "held-out 160 63.7% 0.500 0.812" in part(read(folder), *HEADINGS)


@pytest.mark.parametrize(("clusters", "shapes", "numbers"), [(3, 3, 0), (8, 6, 8), (40, 6, 0)])
def test_the_map_tells_clusters_apart_by_more_than_colour(folder, clusters, shapes, numbers):
    """Few clusters each have a shape, also in the legend; more have a number at their position."""
    put(folder, "selection_map.jsonl", points(clusters))
    page = read(folder)
    [title] = drawings(page)
    assert title == (
        f"Map of the prompts: {3 * clusters} prompts in {clusters} clusters, {clusters} with a rehearsed pair"
    )
    texts = [text for text in page.words if text.strip().isdigit()]
    assert sum(int(text) <= clusters for text in texts) >= (numbers or (clusters if clusters <= 6 else 0))
    marks = {a["d"] for tag, a in page.elements if tag == "path" and a.get("id")}
    assert len(marks) >= shapes
    # Follows the page's colors, light or dark.
    source = (folder / "report.html").read_text()
    drawn = source[source.index(title) :]
    drawn = drawn[: drawn.index("</svg>")]
    assert "var(--series-1)" in drawn and "currentColor" in drawn and "#0072b2" not in drawn


def test_a_large_map_is_thinned_and_every_chosen_prompt_stays(folder):
    rows = points(4, of_each=500)
    put(folder, "selection_map.jsonl", rows)
    page = read(folder)
    assert "800 of 2,000 prompts are shown." in page.text
    assert "2,000 prompts in 4 clusters, 4 with a rehearsed pair" in page.text
    assert sum(tag == "use" for tag, _ in page.elements) >= 800
    assert (folder / "report.html").stat().st_size < 250_000


def test_rows_of_another_shape_do_not_stop_the_report(folder):
    rows = [{}, {"cluster": "x", "score": "1", "prompt": 3, "response": [1]}, {"cluster": 1e300, "prompt": []}]
    put(folder, "rehearsal.jsonl", rows)
    put(folder, "selection_map.jsonl", [{}, {"x": 1, "y": None, "cluster": 0}, {"x": 1e40, "y": 0, "cluster": 0},
                                        {"x": 1, "y": 2, "cluster": 0}])  # fmt: skip
    set_results(folder, lambda results: results["rl"].update(rehearsal=[1], stopped={"update": "x"}))
    text = part(read(folder), *HEADINGS)
    assert "no cluster 2" in text and "1 prompt in 1 cluster" in text


def test_hostile_pairs_stay_text(folder):
    put(folder, "rehearsal.jsonl", [pair(0, 1.0, HOSTILE, HOSTILE), pair(None, None, HOSTILE, HOSTILE, HOSTILE)])
    put(folder, "metrics.jsonl", [{"stage": "rl", "step": 1, f"forgetting/{HOSTILE[:30]}/nll": 1.0}])
    page = read(folder)
    assert "<script>alert(1)</script></title></style></svg>-->" in part(page, *HEADINGS)
    assert_only_our_script(page)


def test_a_forget_set_that_surely_lost_is_a_warning(folder):
    def lose(results, upper):
        sets = results["evaluate"]["sets"]
        sets["forget"] = sets["held-out"] | {"win_rate": 0.3, "interval": [0.2, upper]}

    said = (
        "The policy forgot: on forget, whose prompts the initial policy answered well, the judge prefers the "
        "initial policy (win rate 30.0%"
    )
    set_results(folder, lambda results: lose(results, 0.51))
    assert said not in read(folder).text
    set_results(folder, lambda results: lose(results, 0.49))
    assert said in read(folder).text


def test_a_run_that_forgetting_ended_says_so(folder):
    stopped = {"set": "forget", "update": 12, "win_rate": 0.3125, "limit": 0.35}
    set_results(folder, lambda results: results["rl"].update(stopped=stopped))
    assert (
        "RL was stopped at update 12: on forget, the win rate over the initial policy had fallen to 31.2%, below 35.0%"
        in read(folder).text
    )
