"""The report's section on labels: which labels count, the comparison of labelers, and the effect of calibration."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from helpers.recipes import write_rows
from helpers.report_pages import HOSTILE, assert_only_our_script, make_run, part, read, set_results

from trl_rlaif import CriterionLabel, Label, Pair
from trl_rlaif.labels import LabelKey, LabelStore

pytestmark = pytest.mark.usefixtures("drawn")

OURS = LabelKey("distilled", {}, "judge-a", "r", "f")
THEIRS = LabelKey("direct", {}, "judge-a", "r", "f")


def write_labels(folder, *, pairs, label_key=OURS, votes=(0.9, 0.8)):
    """Append labels of pairs, given by number."""
    store = LabelStore(folder / "labels.jsonl")
    for number in pairs:
        store.add(label_key, pair(number), Label(f"p{number}", p=sum(votes) / 2, p_12=votes[0], p_21=votes[1]))


def write_pairs(folder, pairs):
    write_rows(folder / "pairs.jsonl", map(asdict, pairs))


def pair(number):
    return Pair(f"p{number}", f"prompt {number}", "yes", "no")


@pytest.fixture
def folder(tmp_path):
    """A run with six pairs and a completed label stage."""
    folder = make_run(tmp_path / "run")
    for drawn in ("labels", "metrics", "samples"):  # plots are slow, and not of labels
        (folder / f"{drawn}.jsonl").unlink()
    write_pairs(folder, map(pair, range(6)))
    set_results(folder, lambda results: results["label"].update(setup=OURS.key))
    return folder


def shown(folder):
    return part(read(folder), "Labels of the judge", "Reward model")


# ---- Which labels count ---------------------------------------------------------------------------------


def test_labels_of_other_settings_and_other_pairs_are_not_counted(folder):
    write_labels(folder, pairs=range(6))
    write_labels(folder, pairs=range(6), label_key=THEIRS, votes=(0.2, 0.9))
    write_labels(folder, pairs=range(6, 40), votes=(0.2, 0.9))  # of human-judged pairs, or of removed ones
    text = shown(folder)
    assert "6 pairs asked in both orders" in text
    assert "6 100.0% · same response" in text and "0 0.0% · second position" in text


def test_a_label_is_its_pairs_by_the_texts(folder):
    """Whatever id the pair has by now, and even if two pairs share the texts."""
    write_labels(folder, pairs=range(5))
    rows = [asdict(pair(number)) | {"id": f"renamed-{number}"} for number in (0, 1, 2)] + [asdict(pair(0))]
    write_rows(folder / "pairs.jsonl", rows)
    assert "4 pairs asked in both orders" in shown(folder)


def test_of_several_labels_of_a_pair_the_last_one_counts(folder):
    write_labels(folder, pairs=range(6), votes=(0.2, 0.9))
    write_labels(folder, pairs=range(6))
    assert "6 100.0% · same response" in shown(folder)


def test_before_the_stage_is_complete_all_lines_count(folder):
    write_labels(folder, pairs=range(4))
    set_results(folder, lambda results: results.pop("label"))
    assert "label not finished 4 labels written" in read(folder).text


def test_broken_lines_are_noted(folder):
    write_labels(folder, pairs=range(6))
    lines = (folder / "labels.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "labels.jsonl").write_bytes(b"".join([*lines[:2], lines[2][:40] + lines[3], *lines[4:]]))
    page = read(folder)
    assert "1 line of labels.jsonl could not be read" in page.text
    assert "4 pairs asked in both orders" in page.text


@pytest.mark.parametrize("content", ["3", "[]", '"x"'])
def test_a_label_stage_of_another_shape_does_not_stop_the_report(folder, content):
    write_labels(folder, pairs=range(2))
    set_results(folder, lambda results: results.update(label=json.loads(content)))
    assert "2 labels written" in read(folder).text


def test_rows_of_another_shape_do_not_stop_the_report(folder):
    write_labels(folder, pairs=range(6))
    with (folder / "pairs.jsonl").open("a") as file:
        for row in (
            {},
            {"prompt": 3, "response_1": 1, "response_2": None},
            {"prompt": [1], "response_1": "", "response_2": ""},
        ):
            file.write(json.dumps(row) + "\n")
    with (folder / "labels.jsonl").open("a") as file:
        for row in ({"setup": OURS.key}, {"setup": OURS.key, "pair": ["x"]}, {"setup": ["x"], "pair": 3}):
            file.write(json.dumps(row) + "\n")
    assert "6 pairs asked in both orders" in shown(folder)


# ---- Comparison of labelers -----------------------------------------------------------------------------


def compared(rate=0.7, **changes):
    return {
        "labeler": "distilled", "judge": "judge-a", "labeled": 6, "mass": {"mean": 0.91, "min": 0.5, "low": 0},
        "agreement": {"rate": rate, "interval": [rate - 0.1, rate + 0.1], "n": 200},
        "position_bias": {"rate": 0.123, "interval": [0.1, 0.2], "n": 6, "first": 1, "second": 0},
        "ece": 0.0423, "pairs_per_second": 12.3,
        "against_first": {"difference": rate - 0.7, "better": 3, "worse": 9, "p_value": 0.146, "n": 200},
    } | changes  # fmt: skip


def test_labelers_are_shown_side_by_side(folder):
    write_labels(folder, pairs=range(6))
    table = {"label": compared(), "rated": compared(0.64, position_bias=None, pairs_per_second=None)}
    set_results(folder, lambda results: results["label"].update(comparison=table))
    text = shown(folder)
    assert "Labeler Agreement Versus the first Position bias Mass ECE Pairs/s" in text
    first, second = text.index("label 70.0% (60.0% to 80.0%)"), text.index("rated 64.0% (54.0% to 74.0%)")
    assert first < second
    assert "points" not in text[first:second]  # the first one is not compared with itself
    assert "12.3% 91.0% 0.042 12.30" in text[first:second]
    assert text[second:].startswith("rated 64.0% (54.0% to 74.0%) \u22126.00 points, p = 0.146 91.0% 0.042")
    assert "an exact McNemar test" in text


def test_without_other_labelers_there_is_no_table(folder):
    write_labels(folder, pairs=range(6))
    assert "McNemar" not in shown(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"against_first": None},
        {"agreement": None, "mass": None, "position_bias": None, "ece": None},
        {"agreement": {"rate": "x", "interval": [1]}, "against_first": {"difference": 0.1}},
    ],
)
def test_numbers_that_are_not_known_stay_empty(folder, change):
    write_labels(folder, pairs=range(6))
    table = {"label": compared(), "rated": compared(**change), "odd": 3}
    set_results(folder, lambda results: results["label"].update(comparison=table))
    text = shown(folder)
    assert "rated" in text and "odd" in text and "None" not in text


def test_hostile_names_stay_text(folder):
    write_labels(folder, pairs=range(6))
    table = {HOSTILE: compared(labeler=HOSTILE, judge=HOSTILE), f"{HOSTILE}2": compared()}
    set_results(folder, lambda results: results["label"].update(comparison=table, setup=OURS.key))
    page = read(folder)
    assert page.text.count("<script>alert(1)</script>") == 2
    assert_only_our_script(page)


# ---- Criteria -------------------------------------------------------------------------------------------


def write_criteria(folder, number, p, *criteria):
    label = Label(f"p{number}", p=p, criteria=[CriterionLabel(*one, **of) for *one, of in criteria])
    LabelStore(folder / "labels.jsonl").add(OURS, pair(number), label)


def test_every_criterion_is_shown_over_all_pairs_and_by_pair(folder):
    for number, (p, met) in enumerate([(0.9, (0.8, 0.1)), (0.2, (0.5, 0.4)), (0.5, (1.0, 0.0)), (0.7, (0.3, 0.3))]):
        scores = {"score_1": met[0], "score_2": met[1]}
        write_criteria(folder, number, p, ("is short", 2.0, scores), ("is rude", -1.0, scores))
    held = {"score_1": 0.9, "score_2": 0.2, "veto": True}
    write_criteria(folder, 4, 0.6, ("only here", 0.5, {"p": 0.75, "p_12": 0.7, "p_21": 0.8}), ("must hold", 0.0, held))
    text = shown(folder)
    # Of four pairs, one has a tie as its label, and one a tie by the criterion.
    assert "Criterion Weight Pairs Mean score Agrees with the label is short 2.00 4 0.425 50.0%" in text
    assert "is rude \u22121.00 4 0.425 50.0% only here 0.500 1 100.0% must hold veto 1 0.550 100.0%" in text
    assert "Criterion Weight p(1) Response 1 Response 2 is short 2.00 0.80 0.10 is rude \u22121.00 0.80 0.10" in text
    assert "Criterion Weight p(1) Response 1 Response 2 only here 0.500 0.75 must hold veto 0.90 0.20" in text


def test_many_criteria_are_counted(folder):
    scores = {"score_1": 0.5, "score_2": 0.5}
    write_criteria(folder, 0, 0.6, *[(f"criterion {i}", 1.0, scores) for i in range(31)], ("shared", 1.0, scores))
    write_criteria(folder, 1, 0.6, ("shared", 1.0, scores))
    text = shown(folder)
    assert text.index("shared 1.00 2 0.500") < text.index("criterion 0 1.00 1 0.500")
    assert "2 more criteria of fewer pairs are in labels.jsonl" in text


def test_criteria_of_another_shape_and_hostile_ones(folder):
    write_labels(folder, pairs=range(6))
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    odd = [3, [3], [{"criterion": ["x"], "weight": "y"}], [{"weight": 1}], {"criterion": "x"}]
    for row, criteria in zip(rows, odd, strict=False):
        row["criteria"] = criteria
        row.pop("crc32", None)
    rows[5]["criteria"] = [{"criterion": HOSTILE, "weight": 1, "score_1": 0.5, "score_2": 1e300}]
    write_rows(folder / "labels.jsonl", rows)
    page = read(folder)
    assert "None" not in page.text and "<script>alert(1)</script>" in page.text
    assert_only_our_script(page)


# ---- Calibration ----------------------------------------------------------------------------------------


def test_what_calibration_did_is_said(folder):
    write_labels(folder, pairs=range(6))
    numbers = {
        "temperature": 2.5, "position_bias": 0.75, "pairs": 40, "shared_with_run": 0,
        "cross_validated": {
            "before": {"ece": 0.212, "agreement": {"rate": 0.625, "interval": [0.4, 0.7], "n": 40}},
            "after": {"ece": 0.071, "agreement": {"rate": 0.65, "interval": [0.4, 0.7], "n": 40}},
        },
        "run": {"before": {"agreement": None, "ece": None}, "after": {"agreement": None, "ece": None}},
    }  # fmt: skip
    set_results(folder, lambda results: results["label"].update(calibration=numbers))
    assert (
        "Calibrated on 40 pairs judged by people: temperature 2.50, advantage of the first position +0.750 nats. "
        "Cross-validated, the calibration error changes from 0.212 to 0.071, agreement from 62.5% to 65.0%."
    ) in shown(folder)


def test_a_bias_that_cancels_is_not_shown_and_a_calibration_that_is_not_used_is_said(folder):
    write_labels(folder, pairs=range(6))
    numbers = {"used": True, "temperature": 2.5, "position_bias": None, "pairs": 40, "cross_validated": {}}
    set_results(folder, lambda results: results["label"].update(calibration=numbers))
    assert "temperature 2.50. Cross-validated" in shown(folder)
    numbers |= {
        "used": False,
        "reason": "cross-validation does not show that it helps (log-loss 0.6 before, 0.7 after)",
    }
    set_results(folder, lambda results: results["label"].update(calibration=numbers))
    text = shown(folder)
    assert f"Not calibrated, despite 40 pairs judged by people: {numbers['reason']}." in text
    assert "Calibrated on" not in text


@pytest.mark.parametrize("numbers", [None, {}, 3])
def test_without_calibration_nothing_is_said(folder, numbers):
    write_labels(folder, pairs=range(6))
    set_results(folder, lambda results: results["label"].update(calibration=numbers))
    assert "Calibrated" not in shown(folder)


# ---- Rankings -------------------------------------------------------------------------------------------

RANKING = {"method": "tournament", "prompts": 1, "responses": 3, "questions": 3, "all_questions": 6, "position": 0.31,
           "position_interval": [0.2, 0.42], "wrong": 0.125, "certain": 0.5}  # fmt: skip


@pytest.fixture
def ranked(folder):
    """Three responses to one prompt, ranked by three questions of a tournament, two of them about a and b."""
    pairs = [Pair(f"p-{i}-{j}", "why?", i, j) for i, j in ("ab", "ac", "bc")]
    write_pairs(folder, pairs)
    store = LabelStore(folder / "labels.jsonl")
    for first, second, p in (("a", "b", 0.6), ("b", "a", 0.7), ("c", "b", 0.2)):
        store.add(OURS, Pair("x", "why?", first, second), Label("x", p=p, p_12=p))
    row = {"prompt": "why?", "category": "chat", "responses": ["b", "a", "c"], "strengths": [0.5, 0.25, -0.75],
           "intervals": [[0.1, 0.9], [-0.1, 0.6], [-1, -0.5]], "answers": [[1, 0, 0.6], [0, 1, 0.7], [2, 0, 0.2]],
           "pairs": {"p-a-b": 0.44, "p-a-c": 0.95, "p-b-c": 0.8}}  # fmt: skip
    write_rows(folder / "rankings.jsonl", [row])
    set_results(folder, lambda results: results["label"].update(ranking=RANKING))
    return folder


def test_a_ranking_says_what_was_asked_and_how_sure_it_is(ranked):
    text = shown(ranked)
    assert "3 of 6 (50.0%)" in text and "+0.310 nats (interval +0.200 to +0.420)" in text
    assert "12.5%; 50.0% are in the right order" in text and "3 responses to 1 prompt" in text
    assert text.index("1. +0.500 (+0.100 to +0.900) b") < text.index("2. +0.250") < text.index("3. −0.750")


def test_ranked_pairs_have_the_rankings_probabilities_and_both_orders_of_the_judge(ranked):
    text = shown(ranked)
    assert "1 of 3 at 0.9 or more" in text  # p-a-c, which was never asked about
    assert "1 pair asked in both orders" in text and "1 100.0% · first position" in text
    assert "p(1) = 0.60 when shown first, 0.30 when shown second" in text and "p(1) = 0.44" in text


def test_hostile_rankings_are_shown_as_text(ranked):
    row = {"prompt": HOSTILE, "category": HOSTILE, "responses": [HOSTILE, None], "strengths": ["x", 1e400, None],
           "intervals": HOSTILE, "answers": {}, "pairs": {HOSTILE: 7}}  # fmt: skip
    write_rows(ranked / "rankings.jsonl", [row, [], row | {"pairs": []}])
    assert_only_our_script(read(ranked))


# ---- Juries ---------------------------------------------------------------------------------------------

JURY = {"join": "log_odds", "disagreement": 0.123, "disputed": 4,
        "members": {"label": {"votes": 3, "reliability": 0.62, "with_jury": 1.0},
                    "brief": {"votes": 2, "reliability": -0.1, "with_jury": 0.25}}}  # fmt: skip


@pytest.fixture
def jury(folder):
    """Three pairs with the votes of two members, one of which skipped a pair."""
    pairs = [Pair(f"p-{i}", f"why {i}?", "a", "b", human=i or None) for i in range(3)]
    write_pairs(folder, pairs)
    write_rows(folder / "jury.jsonl", (
        {"id": "p-0", "p": 0.95, "disagreement": 0.01, "votes": {"label": 0.96, "brief": 0.94}},
        {"id": "p-1", "p": 0.4, "disagreement": 0.35, "votes": {"label": 0.05, "brief": 0.75}},
        {"id": "p-2", "p": 0.3, "disagreement": None, "votes": {"label": 0.3, "brief": None}}))  # fmt: skip
    set_results(folder, lambda results: results["label"].update(jury=JURY))
    return folder


def test_a_jury_says_what_was_learned_of_its_members(jury):
    text = shown(jury)
    assert "votes combined by log odds" in text and "0.123 on average; 4 pairs left out because of it" in text
    assert "label 3 0.620 100.0% brief 2 −0.100 25.0%" in text and "0 is chance" in text
    set_results(jury, lambda results: results["label"]["jury"].update(join="dawid_skene"))
    assert "0.5 is chance" in shown(jury)


def test_a_jurys_labels_come_with_its_votes_the_most_disputed_first(jury):
    text = shown(jury)
    assert "1 of 3 at 0.9 or more" in text and "asked in both orders" not in text
    disputed, unknown = text.index("votes: label 0.05, brief 0.75"), text.index("votes: label 0.30 ")
    assert disputed < text.index("votes: label 0.96, brief 0.94") < unknown
    assert "response 2 preferred, p(1) = 0.40" in text


def test_hostile_juries_are_shown_as_text(jury):
    row = {"id": "p-0", "p": "x", "disagreement": HOSTILE, "votes": {HOSTILE: 0.5, "y": 7}}
    write_rows(jury / "jury.jsonl", [row, [], row | {"p": 0.5}])
    set_results(jury, lambda results: results["label"].update(jury={"join": HOSTILE, "members": {HOSTILE: HOSTILE}}))
    assert_only_our_script(read(jury))


def test_a_taught_judge_that_rates_has_no_position(folder):
    side = {"agreement": {"rate": 0.9, "interval": [0.8, 0.95], "n": 40}, "position_bias": None, "ece": 0.1}
    judge = {"judge": "tiny", "used": True, "gain": 0.4, "standard_error": 0.1}
    source = {"taught": 160, "held_out": 40, "before": side, "after": side}
    set_results(folder, lambda results: results.update(judge=judge | {"sources": {"all": source}}))
    rated = (
        "Accuracy before after ECE before after all 160 40 90.0% (80.0% to 95.0%) 90.0% (80.0% to 95.0%) 0.100 0.100"
    )
    assert rated in read(folder).text
    side["position_bias"] = {"rate": 0.25, "interval": None, "n": 40}
    set_results(folder, lambda results: results["judge"].update(sources={"all": source}))
    assert "Position bias before after ECE before after all" in read(folder).text
    assert "90.0% (80.0% to 95.0%) 25.0% 25.0% 0.100 0.100" in read(folder).text
