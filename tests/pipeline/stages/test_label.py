"""The label stage on a tiny model: new and kept labels, comparison, calibration, interrupted runs and shards."""

from __future__ import annotations

import gc
import json
import pkgutil
import shutil
import time
from datetime import date

import pytest
from helpers.labeling import LABEL_ALONE, label_stage, make_pairs, preferences, results, stopping
from helpers.recipes import run_cli, write_recipe, write_rows
from helpers.tiny import CHAT_TEMPLATE
from scipy.stats import binomtest

from trl_rlaif import UserError
from trl_rlaif.data import Pair
from trl_rlaif.errors import RunError
from trl_rlaif.evaluation import agreement, calibration_error, compare_agreement
from trl_rlaif.files import read_lines
from trl_rlaif.judging.scoring import ContinuationScorer
from trl_rlaif.labels import LabelStore
from trl_rlaif.labels.calibration import Calibration, cross_validate
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline import context as context_module
from trl_rlaif.pipeline.judges import Judges
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.work import label as label_module


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Each stage ends with a full garbage collection, which can skip the objects of imported libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def label(tiny_model, tmp_path):
    """A function that runs the label stage over pairs, with given keys of its section; returns the run folder."""
    return label_stage(tiny_model, tmp_path)


def own_labels(folder):
    """The labels of the recipe's first labeler, by id."""
    return {row["id"]: row for row in read_lines(folder / "labels.jsonl") if row["setup"] == results(folder)["setup"]}


@pytest.fixture
def no_judge(monkeypatch):
    """A function that forbids loading a judge from then on."""

    def forbid():
        monkeypatch.setattr(Judges, "load", lambda *_: pytest.fail("a judge was loaded"))

    return forbid


# ---- New and kept labels --------------------------------------------------------------------------------


class Tomorrow(date):
    """``date`` with January 2, 2031 as today."""

    @classmethod
    def today(cls):
        return cls(2031, 1, 2)


def templated(tiny_model, folder, template):
    """The tiny model with another chat template."""
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_what_a_chat_template_is_told_makes_labels_anew(tiny_model, tmp_path, label):
    variable = CHAT_TEMPLATE.replace("{% for", "{{ effort }}{% for", 1)
    own = templated(tiny_model, tmp_path / "own", variable)
    judge = {"path": own, "dtype": "float32"}
    first = results(label(judge=judge))
    second = results(label(judge={**judge, "chat_template_kwargs": {"effort": "the lazy dog " * 9}}))
    assert (first["made"], second["made"]) == (12, 12) and first["setup"] != second["setup"]
    folder = label(judge="same", model={"path": own, "chat_template_kwargs": {"effort": "the lazy dog " * 9}})
    assert results(folder)["setup"] == second["setup"] and results(folder)["made"] == 0  # same model and arguments


def test_a_run_that_is_resumed_on_another_day_labels_as_on_the_first(tiny_model, tmp_path, label, monkeypatch):
    today = CHAT_TEMPLATE.replace("{% for", "{{ strftime_now('%d %B %Y') * 9 }}{% for", 1)
    judge = {"path": templated(tiny_model, tmp_path / "dated", today)}
    folder = label(judge=judge, pairs=6)
    before, day = own_labels(folder), json.loads((folder.state / "date").read_text())["date"]
    assert day == date.today().isoformat()
    monkeypatch.setattr(context_module, "date", Tomorrow)
    folder = label(judge=judge)  # six more pairs, on another day
    assert results(folder)["made"] == 6 and {id: own_labels(folder)[id] for id in before} == before
    other = label("other", judge=judge)
    assert results(other)["setup"] != results(folder)["setup"] and "2031-01-02" in (other.state / "date").read_text()
    first, later = own_labels(folder), own_labels(other)
    assert all(abs(first[id]["p"] - later[id]["p"]) > 1e-6 for id in first)  # the date does change the answers


def test_another_option_labels_anew_and_keeps_the_old_lines(label):
    folder = label()
    before, setup = (folder / "labels.jsonl").read_bytes(), results(folder)["setup"]
    assert results(folder)["made"] == 12
    label(labeler={"distilled": {"debias": "mean_prob"}})
    after = (folder / "labels.jsonl").read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == 24
    assert results(folder)["made"] == 12 and results(folder)["setup"] != setup
    assert all(row["p"] == pytest.approx((row["p_12"] + row["p_21"]) / 2) for row in own_labels(folder).values())
    # Back to the first option: its labels are still there.
    label()
    assert results(folder)["setup"] == setup and (folder / "labels.jsonl").read_bytes() == after


def test_what_determines_no_label_makes_none(label, no_judge):
    folder = label()
    before = (folder / "labels.jsonl").read_bytes()
    no_judge()
    label(min_confidence=0.5001, batch_tokens=4096, labeler={"distilled": {"shots": 0}})  # the option's default
    assert results(folder)["made"] == 0 and results(folder)["labeled"] == 12
    assert results(folder)["pairs_per_second"] is None
    assert (folder / "labels.jsonl").read_bytes() == before


def test_another_prompt_file_labels_anew(label, tmp_path):
    label()
    (tmp_path / "prompt" / "base.txt").write_text("Which one?")
    assert results(label())["made"] == 12


def test_new_pairs_are_made_and_no_others(label):
    folder = label(pairs=8)
    before = (folder / "labels.jsonl").read_bytes()
    pairs = make_pairs(4, start=8) + make_pairs(8)
    pairs[5]["id"] = "renamed"  # with the same texts as before
    label(pairs=pairs)
    assert results(folder)["made"] == 4 and results(folder)["labeled"] == 12
    after = (folder / "labels.jsonl").read_bytes()
    assert after.startswith(before)
    assert {json.loads(line)["id"] for line in after[len(before) :].splitlines()} == {"p8", "p9", "p10", "p11"}
    assert list(preferences(folder)) == [pair["id"] for pair in pairs]


def test_pairs_with_the_same_texts_are_labeled_once(label):
    pairs = make_pairs(4)
    folder = label(pairs=[*pairs, pairs[0] | {"id": "twin"}], report={})
    assert results(folder)["labeled"] == 5 and results(folder)["made"] == 4
    first, *_, twin = preferences(folder).values()
    assert first | {"id": "twin"} == twin
    assert "5 of 5 pairs" in (folder / "report.html").read_text()
    assert "Confidence of 5 labels" in (folder / "report.html").read_text()


def test_what_cannot_be_judged_is_counted_and_adds_one_line(label):
    pairs = [*make_pairs(4), {"id": "long", "prompt": "why " * 600, "response_1": "a", "response_2": "b"}]
    folder = label(pairs=pairs)
    assert results(folder)["skipped"] == {"longer than the judge's context": 1}
    assert (results(folder)["labeled"], results(folder)["made"]) == (4, 4)
    before = (folder / "labels.jsonl").read_bytes()
    label(pairs=pairs, min_confidence=0.50001)  # asked again, and fails again
    assert (folder / "labels.jsonl").read_bytes() == before and results(folder)["made"] == 0


def test_nothing_could_be_judged(label):
    with pytest.raises(RunError, match="2 pairs: longer than the judge's context"):
        label(pairs=[{"prompt": "why " * 600 + str(i), "response_1": "a", "response_2": "b"} for i in range(2)])


def test_broken_lines_are_counted_and_their_pairs_labeled_again(label):
    folder = label()
    lines = (folder / "labels.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "labels.jsonl").write_bytes(b"".join([*lines[:3], lines[3][:50] + lines[4], *lines[5:]]) + lines[0][:9])
    label(min_confidence=0.5001)
    assert (results(folder)["broken_lines"], results(folder)["made"], results(folder)["labeled"]) == (1, 2, 12)


# ---- Killed passes --------------------------------------------------------------------------------------


def untimed(folder):
    """The stage's results without times."""
    numbers = json.loads(json.dumps(results(folder)))
    of_tasks = numbers.get("comparison", {}).values()
    for each in (numbers, *of_tasks):
        assert each.pop("pairs_per_second") > 0
    return {key: value for key, value in numbers.items() if key != "seconds"}


def stopped_after(function, calls):
    """Wrap a function so that it interrupts the run after ``calls`` calls."""
    counted = []

    def run(*arguments, **named):
        if len(counted) == calls:
            raise KeyboardInterrupt
        counted.append(1)
        return function(*arguments, **named)

    return run


@pytest.mark.parametrize(
    ("place", "calls"),
    [
        ("trl_rlaif.labels.LabelStore.add", 1),
        ("trl_rlaif.labels.LabelStore.add", 13),
        ("trl_rlaif.pipeline.work.label.write_preferences", 0),  # after the last label
        ("trl_rlaif.pipeline.digests.complete", 1),
    ],
)
def test_the_numbers_are_the_same_whenever_it_was_killed(label, monkeypatch, place, calls):
    settings = {"precision": "auto", "batch_tokens": 300, "compare": {"rated": {"labeler": "direct"}}}
    whole = label("whole", **settings)
    assert results(whole)["made"] == 12 and results(whole)["precision"]["deviation"]
    module, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, stopped_after(getattr(module, name), calls))
        label("killed", **settings)
    killed = label("killed", **settings)
    assert untimed(killed) == untimed(whole)
    assert (killed / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()
    assert not list(killed.state.glob("*.work"))


def test_a_pass_that_is_complete_is_another_one_than_the_next(label, monkeypatch):
    """Even if it was killed before it cleaned up."""
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "drop_work", lambda self, stage: None)
        folder = label()
    assert list(folder.state.glob("label.work/*"))
    label(min_confidence=0.5001)
    assert results(folder)["made"] == 0 and results(folder)["precision"] is None


def test_the_seconds_of_all_attempts_count(label, monkeypatch):
    add = LabelStore.add
    monkeypatch.setattr(LabelStore, "add", lambda self, *arguments: (time.sleep(0.02), add(self, *arguments)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(label_module, "write_preferences", stopped_after(None, 0))
        label()
    numbers = results(label())
    assert numbers["made"] == 12 and 12 / numbers["pairs_per_second"] > 12 * 0.02
    assert numbers["seconds"] > 12 * 0.02  # although the last attempt loads no judge


# ---- Preferences and results ----------------------------------------------------------------------------


def test_unsure_labels_are_left_out_and_counted(label):
    folder = label()
    sure = {id: max(row["p"], 1 - row["p"]) for id, row in own_labels(folder).items()}
    least = sorted(sure.values())[5]
    assert results(folder)["unsure"] == 0 and len(preferences(folder)) == 12
    label(min_confidence=least)
    assert results(folder)["unsure"] == 5 and results(folder)["labeled"] == 12
    assert set(preferences(folder)) == {id for id, value in sure.items() if value >= least}
    with pytest.raises(UserError, match="reaches a confidence of 1.*min_confidence"):
        label(min_confidence=1.0)


def test_numbers_are_those_of_the_measures(label):
    folder = label()
    pairs, labels, found = read_lines(folder / "pairs.jsonl"), own_labels(folder), results(folder)
    p, human = [labels[pair["id"]]["p"] for pair in pairs], [pair["human"] for pair in pairs]
    wanted = agreement(p, human)
    assert found["agreement"] == wanted | {"interval": list(wanted["interval"])}
    assert found["agreement"]["n"] == 8
    assert found["ece"] == pytest.approx(calibration_error(p, human))
    assert {name: one["n"] for name, one in found["agreement_by_category"].items()} == {"a": 4, "b": 4}
    assert found["mean_confidence"] == pytest.approx(sum(max(x, 1 - x) for x in p) / 12)
    for row in preferences(folder).values():
        pair = next(pair for pair in pairs if pair["id"] == row["id"])
        chosen = 1 if labels[row["id"]]["p"] >= 0.5 else 2
        assert row["chosen"][0]["content"] == pair[f"response_{chosen}"]
        assert row["p"] == pytest.approx(max(labels[row["id"]]["p"], 1 - labels[row["id"]]["p"]))
        assert row["human"] == (None if pair["human"] is None else pair["human"] == chosen)


def test_two_labelers_share_the_file_and_are_compared(label):
    compare = {"rated": {"labeler": "direct"}, "one-order": {"labeler": {"distilled": {"orders": "12"}}}}
    folder = label(compare=compare, report={})
    assert len(read_lines(folder / "labels.jsonl")) == 36
    table = results(folder)["comparison"]
    assert list(table) == ["label", "one-order", "rated"]
    assert [one["labeler"] for one in table.values()] == ["distilled", "distilled", "direct"]
    # Recompute each row from the file, and the tests against the first labeler from the labels of both.
    pairs = read_lines(folder / "pairs.jsonl")
    known = [pair for pair in pairs if pair["human"]]
    human = [pair["human"] for pair in known]
    by_setup = {}
    for row in read_lines(folder / "labels.jsonl"):
        by_setup.setdefault(row["setup"], {})[row["id"]] = row["p"]
    (first, *others), page = by_setup.values(), (folder / "report.html").read_text()
    assert first == {id: row["p"] for id, row in own_labels(folder).items()}
    for (name, one), labels in zip(table.items(), (first, *others), strict=True):
        p = [labels[pair["id"]] for pair in known]
        wanted = agreement(p, human)
        assert one["agreement"]["rate"] == wanted["rate"] and one["agreement"]["interval"] == list(wanted["interval"])
        against = compare_agreement(p, [first[pair["id"]] for pair in known], human)
        assert one["against_first"] == against
        n = against["better"] + against["worse"]
        assert against["p_value"] == (pytest.approx(binomtest(against["better"], n).pvalue) if n else 1.0)
        assert f'<th scope="row">{name}</th>' in page
    assert table["rated"]["position_bias"] is None and table["label"]["position_bias"]["n"] == 12
    assert "an exact McNemar test" in page
    # The reward model learns from the first labeler's labels.
    assert all(
        row["p"] == pytest.approx(max(first[row["id"]], 1 - first[row["id"]])) for row in preferences(folder).values()
    )
    assert results(folder)["setup"] == own_labels(folder)["p0"]["setup"]


# ---- Calibration ----------------------------------------------------------------------------------------


def judged(count, start=100):
    """Human-judged pairs; the choices do not depend on the labels, so about half of them agree by chance."""
    return [pair | {"human": 1 + i * 5 % 3 % 2} for i, pair in enumerate(make_pairs(count, start))]


def choose_as(folder, rows):
    """The rows with the judge's own choices as human choices, so that a lower temperature is sure to help."""
    labels = {row["pair"]: row["p"] for row in read_lines(folder / "labels.jsonl")}
    pairs = {pair_key(Pair("", r["prompt"], r["response_1"], r["response_2"])): r for r in rows}
    return [row | {"human": 1 if labels[key] > 0.5 else 2} for key, row in pairs.items()]


@pytest.mark.parametrize("debias", ["mean_logit", "mean_prob"])
def test_labels_are_calibrated_on_pairs_that_people_judged(label, tmp_path, no_judge, debias):
    """The tiny judge has little confidence; human choices that match its own make its labels more confident."""
    labeler, own = {"distilled": {"debias": debias}}, make_pairs(12)
    asked = label(output="asked", pairs=[*judged(21), *own[:3]], labeler=labeler)
    given = choose_as(asked, [*judged(21), *own[:3]])
    write_rows(tmp_path / "judged.jsonl", [*given, *[r | {"human": 0} for r in judged(3, 200)]])
    folder = label(calibration="judged.jsonl", report={}, labeler=labeler)
    found, rows = results(folder)["calibration"], own_labels(folder)
    assert len(rows) == 12 + 21  # shared pairs are labeled once, ties not at all
    assert (found["used"], found["reason"], found["pairs"], found["shared_with_run"]) == (True, None, 24, 3)
    observed, human = [rows[pair["id"]] for pair in given], [pair["human"] for pair in given]
    fitted = Calibration.fit(observed, human, mean_prob=debias == "mean_prob")
    assert found["temperature"] == pytest.approx(1 / fitted.scale, rel=1e-6) and found["temperature"] < 1
    assert found["position_bias"] is None  # both orders were asked
    prompts = [pair["prompt"] for pair in given]
    wanted = cross_validate(observed, human, prompts, mean_prob=debias == "mean_prob", seed=7)
    assert found["cross_validated"]["gain"] == pytest.approx(wanted["gain"], rel=1e-6)
    assert found["cross_validated"]["gain"] > found["cross_validated"]["standard_error"]
    # The run's own pairs, without the three used for the fit.
    unseen = [pair for pair in own[3:] if pair["human"]]
    p = [fitted.apply(rows[pair["id"]]) for pair in unseen]
    after = found["run"]["after"]
    assert after["agreement"]["n"] == len(unseen)
    assert after["ece"] == pytest.approx(calibration_error(p, [pair["human"] for pair in unseen]), abs=1e-9)
    # preferences/ holds the calibrated labels, labels.jsonl the judge's own.
    for row in preferences(folder).values():
        calibrated = fitted.apply(rows[row["id"]])
        assert row["p"] == pytest.approx(max(calibrated, 1 - calibrated), abs=1e-6)
    assert len(preferences(folder)) == 12
    page = (folder / "report.html").read_text()
    assert "Calibrated on 24 pairs judged by people" in page
    assert "advantage of the first position" not in page
    # Without calibration, and with it again: no new labels.
    no_judge()
    label(labeler=labeler)
    assert results(folder)["calibration"] is None
    assert {row["id"]: row["p"] for row in preferences(folder).values()} == pytest.approx(
        {id: max(row["p"], 1 - row["p"]) for id, row in own_labels(folder).items() if id in {p["id"] for p in own}}
    )
    label(calibration="judged.jsonl", labeler=labeler)
    assert results(folder)["calibration"]["pairs"] == 24


@pytest.mark.parametrize(("prompts", "reason"), [
    ("own", "cross-validation does not show that it helps"), ("one", "all judged pairs are of one prompt"),
])  # fmt: skip
def test_a_calibration_that_shows_no_gain_is_left_out_and_said(label, tmp_path, capsys, prompts, reason):
    """If human choices are unrelated to the labels, the judge's labels are kept."""
    rows = judged(21) if prompts == "own" else [row | {"prompt": "what is a fox?"} for row in judged(21)]
    write_rows(tmp_path / "judged.jsonl", rows)
    folder = label(calibration="judged.jsonl", report={})
    found, labels = results(folder)["calibration"], own_labels(folder)
    assert (found["used"], found["pairs"]) == (False, 21) and reason in found["reason"]
    assert found["temperature"] > 0
    assert f"Warning: the calibration is not used: {reason}" in capsys.readouterr().err
    for row in preferences(folder).values():
        p = labels[row["id"]]["p"]
        assert row["p"] == pytest.approx(max(p, 1 - p), abs=1e-12)
    page = (folder / "report.html").read_text()
    assert "Not calibrated, despite 21 pairs judged by people" in page and reason in page


@pytest.mark.parametrize("rows", [judged(19), [pair | {"human": 1} for pair in judged(30)], make_pairs(5)])
def test_too_few_judged_pairs_are_found_before_the_judge_is_asked(label, tmp_path, no_judge, rows):
    write_rows(tmp_path / "judged.jsonl", rows)
    no_judge()
    with pytest.raises(UserError, match="too few to calibrate with"):
        label(calibration="judged.jsonl")


def test_twenty_judged_pairs_are_enough(label, tmp_path):
    write_rows(tmp_path / "judged.jsonl", judged(20))
    found = results(label(pairs=3, calibration="judged.jsonl"))["calibration"]
    assert found["pairs"] == found["cross_validated"]["after"]["agreement"]["n"] == 20


# ---- Interrupted runs -----------------------------------------------------------------------------------


def test_interrupted_after_every_few_labels(label, tmp_path, monkeypatch):
    """Two labelers and a calibration, stopped again and again, give bit-identical labels in the same order.

    On many processors, different batches give the same bits, so the batches are compared, too.
    """
    batches, compute = [], ContinuationScorer.__call__

    def recording(scorer, groups):
        batches.append(tuple(tuple(context) for group in groups for context in group))
        return compute(scorer, groups)

    monkeypatch.setattr(ContinuationScorer, "__call__", recording)
    write_rows(tmp_path / "judged.jsonl", judged(20))
    pairs = [*make_pairs(10), {"id": "long", "prompt": "why " * 600, "response_1": "a", "response_2": "b"}]
    section = {"calibration": "judged.jsonl", "compare": {"rated": {"labeler": "direct"}}}
    undisturbed = label("undisturbed", pairs, **section)
    wanted, batches[:] = set(batches), []
    written, stops, folder = stopping(monkeypatch, every=5), 0, None
    while folder is None:
        try:
            folder = label("stopped", pairs, **section)
        except KeyboardInterrupt:
            stops += 1
    assert len(written) == 2 * 11 + 20 and stops == 42 // 5
    assert set(batches) == wanted
    assert (folder / "labels.jsonl").read_bytes() == (undisturbed / "labels.jsonl").read_bytes()
    assert preferences(folder) == preferences(undisturbed)
    assert not list(folder.state.glob("*.work"))


def test_pairs_that_appear_while_a_run_is_stopped_are_labeled_too(label, monkeypatch):
    stopping(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        label(pairs=8)
    folder = label(pairs=12)
    assert results(folder)["labeled"] == 12 and results(folder)["made"] == 9
    assert len(read_lines(folder / "labels.jsonl")) == 12


# ---- Several machines -----------------------------------------------------------------------------------


def test_the_shares_of_three_machines_are_one_run(label, tmp_path, no_judge):
    one = label("one", pairs=10)
    shares = [label(f"share{i}", pairs=10, shard=f"{i}/3") for i in (1, 2, 3)]
    assert [results(share)["made"] for share in shares] == [4, 3, 3]
    assert [results(share)["shard"] for share in shares] == ["1/3", "2/3", "3/3"]
    assert not any((share / "preferences").exists() or share.is_complete("label") for share in shares)
    (tmp_path / "joined").mkdir()
    contents = [(share / "labels.jsonl").read_bytes() for share in (shares[2], shares[0], shares[1])]
    (tmp_path / "joined" / "labels.jsonl").write_bytes(b"".join(contents))
    no_judge()
    joined = label("joined", pairs=10)
    assert results(joined)["made"] == 0 and results(joined)["labeled"] == 10
    for ours, theirs in zip(preferences(joined).values(), preferences(one).values(), strict=True):
        # Different batches may change the last digits.
        assert ours.pop("p") == pytest.approx(theirs.pop("p"), abs=1e-5)
        assert ours == theirs


def test_a_share_may_be_empty(label, tmp_path):
    shares = [label(f"share{i}", pairs=2, shard=f"{i}/3") for i in (1, 2, 3)]
    assert [results(share)["pairs"] for share in shares] == [1, 1, 0]
    assert (results(shares[2])["labeled"], results(shares[2])["agreement"]) == (0, None)
    assert not (shares[2] / "labels.jsonl").exists()


def test_shares_of_two_labelers(label):
    folder = label(pairs=5, shard="2/2", compare={"rated": {"labeler": "direct"}})
    assert [row["id"] for row in read_lines(folder / "labels.jsonl")] != []
    assert sorted(row["id"] for row in read_lines(folder / "labels.jsonl")) == ["p1", "p1", "p3", "p3"]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/3", "1.0/3"])
def test_a_wrong_share_is_the_users_error(tiny_model, tmp_path, monkeypatch, capsys, text):
    write_rows(tmp_path / "pairs.jsonl", make_pairs(3))
    sections = {**LABEL_ALONE, "data": {"prompts": None, "pairs": "pairs.jsonl"}}
    recipe = write_recipe(tmp_path, tiny_model, **sections)
    code, stderr = run_cli(monkeypatch, capsys, "run", recipe, "--output", tmp_path / "out", "--shard", text)
    assert code == 2 and f"'{text}' is not a part i/n" in stderr and "--shard i/n" in stderr
    assert not (tmp_path / "out" / "labels.jsonl").exists()
