"""A jury on a tiny model: joining its members' labels, adding a member, and leaving out disputed pairs."""

from __future__ import annotations

import math
from statistics import pstdev

import numpy as np
import pytest
from helpers.labeling import label_stage, make_pairs, preferences, results
from helpers.recipes import write_rows

from trl_rlaif.data import Pair
from trl_rlaif.errors import UserError
from trl_rlaif.evaluation import agreement
from trl_rlaif.files import read_lines
from trl_rlaif.labels.calibration import Calibration
from trl_rlaif.labels.jury import DawidSkene, LogOddsPool
from trl_rlaif.pipeline.jury import Jury
from trl_rlaif.pipeline.label_rows import TaskLabels
from trl_rlaif.recipe.sections import JurySection

RATED, ONE_ORDER = {"labeler": "direct"}, {"labeler": {"distilled": {"orders": "12"}}}
TWO = {"rated": RATED, "one-order": ONE_ORDER}


ALL_JUDGED = (1, 2, 1)
PAIRED = make_pairs(12, human=ALL_JUDGED)


@pytest.fixture
def label(tiny_model, tmp_path):
    """A function that runs the label stage, by default with a jury of three; returns the run folder."""
    run = label_stage(tiny_model, tmp_path)
    write_rows(tmp_path / "judged.jsonl", make_pairs(20, 100, ALL_JUDGED))
    return lambda output="out", jury=None, compare=TWO, **section: run(
        output, PAIRED, jury=jury or {}, compare=compare, **section
    )


def votes(folder, ids):
    """(N, J) probabilities in labels.jsonl, with a column per labeler in the order in which they labeled."""
    by_setup = {}
    for row in read_lines(folder / "labels.jsonl"):
        by_setup.setdefault(row["setup"], {})[row["id"]] = row["p"]
    return np.array([[of[id] for of in by_setup.values()] for id in ids])


IDS = [f"p{i}" for i in range(12)]


@pytest.mark.parametrize(("name", "join"), [("log_odds", LogOddsPool), ("dawid_skene", DawidSkene)])
def test_the_members_labels_are_joined(label, name, join):
    folder = label(jury={"join": name})
    given, rows, numbers, kept = (
        votes(folder, IDS),
        read_lines(folder / "jury.jsonl"),
        results(folder),
        preferences(folder),
    )
    fitted = join.fit(given)
    p = fitted.join(given)
    members = numbers["jury"]["members"]
    assert list(members) == ["label", "one-order", "rated"] == list(rows[0]["votes"])
    for i, row in enumerate(rows):
        spread = pstdev(given[i])
        assert row == {"id": IDS[i], "p": p[i], "disagreement": pytest.approx(spread, abs=1e-12),
                       "votes": dict(zip(members, given[i], strict=True))}  # fmt: skip
        assert kept[IDS[i]]["p"] == max(p[i], 1 - p[i])
        assert kept[IDS[i]]["disagreement"] == pytest.approx(spread, abs=1e-12)
        assert kept[IDS[i]]["chosen"][0]["content"] == PAIRED[i]["response_1" if p[i] >= 0.5 else "response_2"]
    for j, of in enumerate(members.values()):
        same = (given[:, j] > 0.5) == (p > 0.5)
        assert of == {"votes": 12, "reliability": fitted.reliability[j], "with_jury": same.mean()}
    assert numbers["jury"]["disagreement"] == pytest.approx(np.mean([pstdev(row) for row in given]), abs=1e-12)
    assert numbers["labeled"] == 12 and numbers["position_bias"] is None
    human = [pair["human"] for pair in PAIRED]
    assert numbers["agreement"]["rate"] == agreement(p.tolist(), human)["rate"]
    # Each member's numbers are those of its own labels.
    first = numbers["comparison"]["label"]["agreement"]["rate"]
    assert first == agreement(given[:, 0].tolist(), human)["rate"]


def test_a_member_that_joins_later_asks_its_own_questions_alone(label):
    before = label(compare={"one-order": ONE_ORDER})
    stored = (before / "labels.jsonl").read_bytes()
    assert results(before)["made"] == 12 and len(results(before)["jury"]["members"]) == 2
    folder = label()
    new = read_lines(folder / "labels.jsonl")[24:]
    assert (folder / "labels.jsonl").read_bytes().startswith(stored)
    assert len(new) == 12 and {row["labeler"] for row in new} == {"direct"}
    fresh = label("fresh")
    assert (folder / "jury.jsonl").read_bytes() == (fresh / "jury.jsonl").read_bytes()
    assert preferences(folder) == preferences(fresh)
    assert results(folder)["jury"] == results(fresh)["jury"]
    # Removing a member costs nothing.
    label(compare={"rated": RATED})
    assert len(read_lines(folder / "labels.jsonl")) == 36


def test_disputed_pairs_may_be_left_out(label):
    spread = {row["id"]: row["disagreement"] for row in read_lines(label() / "jury.jsonl")}
    most = sorted(spread.values())[5]
    folder = label(jury={"max_disagreement": most})
    assert set(preferences(folder)) == {id for id, value in spread.items() if value <= most}
    assert results(folder)["jury"]["disputed"] == 6 and len(read_lines(folder / "jury.jsonl")) == 12
    with pytest.raises(UserError, match="No pair's votes differ by 0.0 or less") as caught:
        label(jury={"max_disagreement": 0.0})
    assert caught.value.problems[0].fix == "Raise label.jury.max_disagreement."


def test_the_joined_label_is_what_is_calibrated(label):
    """The members also label the human-judged pairs; their votes are joined by the fit to the run's own pairs."""
    folder = label(calibration="judged.jsonl")
    joined = LogOddsPool.fit(votes(folder, IDS))
    judged = make_pairs(20, 100, ALL_JUDGED)
    p = joined.join(votes(folder, [pair["id"] for pair in judged]))
    expected = Calibration.fit([{"p": value} for value in p], [pair["human"] for pair in judged])
    found = results(folder)["calibration"]
    assert found["pairs"] == 20 and found["position_bias"] is None
    assert found["temperature"] == pytest.approx(1 / expected.scale, rel=1e-9)
    own = joined.join(votes(folder, IDS))
    applied = [expected.apply({"p": value}) for value in own] if found["used"] else own
    assert [row["p"] for row in preferences(folder).values()] == pytest.approx([max(x, 1 - x) for x in applied])


# ---- Missing votes --------------------------------------------------------------------------------------


def labels(p, ids="wxyz"):
    """A member's labels: None for a skipped pair, and no label for pairs that are not in ``p``."""
    pairs, masses = [Pair(id, "why?", "a", "b") for id in ids], {"mass_12": None, "mass_21": None}
    rows = {
        id: {"id": id, "p": value, **masses} | ({} if value is not None else {"skipped": "too long"})
        for id, value in p.items()
    }
    return TaskLabels(None, pairs, [rows.get(id) for id in ids], np.array([]), {})


MEMBERS = {
    "one": labels({"w": 0.9, "x": None, "y": None, "z": 0.2}),
    "two": labels({"w": 0.8, "x": 0.3, "y": None, "z": 0.1}),
    "three": labels({"w": 0.7, "x": 0.4}),
}


def test_a_member_may_lack_votes():
    jury = Jury(JurySection(), MEMBERS)
    nan = math.nan
    given = np.array([[0.9, 0.8, 0.7], [nan, 0.3, 0.4], [nan, nan, nan], [0.2, 0.1, nan]])
    p = LogOddsPool.fit(given).join(given)
    assert [label["p"] for label in jury.labels] == [p[0], p[1], None, p[3]]
    assert [label["id"] for label in jury.labels] == [*"wxyz"]
    assert jury.labels[2]["skipped"] == "too long" and "skipped" not in jury.labels[1]
    assert jury.disagreement[2] is None and jury.disagreement[3] == pytest.approx(0.05)
    members = jury.numbers(0)["members"]
    assert [of["votes"] for of in members.values()] == [2, 3, 2]


def test_of_one_vote_nobody_knows_whether_others_agree():
    alone = {"one": labels({"w": 0.9, "x": 0.9}, "wx"), "two": labels({"w": 0.9, "x": None}, "wx")}
    assert Jury(JurySection(), alone).undisputed(np.array([0, 1])).tolist() == [0, 1]
    strict = Jury(JurySection(max_disagreement=0.5), alone)
    assert strict.undisputed(np.array([0, 1])).tolist() == [0]


def test_who_contradicts_all_others_is_named(capsys):
    good, bad = {id: 0.9 if id in "wx" else 0.1 for id in "wxyz"}, {id: 0.1 if id in "wx" else 0.9 for id in "wxyz"}
    members = {"one": labels(good), "two": labels(good), "odd": labels(bad)}
    for join, effect in (("log_odds", "are not counted"), ("dawid_skene", "count against what they say")):
        Jury(JurySection(join=join), members)
        told = capsys.readouterr()
        assert "Warning (odd): this member" in told.err + told.out and f"votes {effect}" in told.err + told.out
        assert "Warning (one)" not in told.err + told.out
