"""Labels on disk: their keys, files after a kill or a concatenation, and the pairs that a pass still has to label."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.judges import PARTS, make_prompt

from trl_rlaif import Label, Pair, UserError
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.labels.store import KEY, Plan, pair_key

SETUP = LabelKey("distilled", {"debias": "mean_logit", "shots": 0}, "judge", "r1", "f00")
PAIRS = [Pair(f"p{i}", f"prompt {i}", f"yes {i}", f"no {i}") for i in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def fill(path, pairs=PAIRS, label_key=SETUP, p=0.75):
    """A file with a label for each pair."""
    store = LabelStore(path)
    for pair in pairs:
        store.add(label_key, pair, Label(pair.id, p=p, p_12=p, p_21=p, mass_12=1.0, mass_21=1.0, judge="judge"))
    return store


def keys_of(pairs, label_key=SETUP):
    return np.array([label_key.of(pair) for pair in pairs], dtype=KEY)


def found(path, pairs=PAIRS, label_key=SETUP):
    return {id: row["p"] for id, row in LabelStore(path).find(label_key, pairs).items()}


# ---- Keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "prompt 0 "},
        {"response_1": "Yes 0"},
        {"response_2": "no  0"},
        {"response_1": "no 0", "response_2": "yes 0"},
        {"prompt": [{"role": "system", "content": "prompt 0"}]},
        {"prompt": [{"role": "user", "content": "prompt"}, {"role": "user", "content": "0"}]},
        {"prompt": "prompt 0yes 0", "response_1": ""},
    ],
)
def test_a_pair_with_another_text_has_another_key(change):
    assert pair_key(replace(PAIRS[0], **change)) != pair_key(PAIRS[0])


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"category": "code"},
        {"human": 2},
        {"extra": {"votes": [1]}},
        {"prompt": [{"role": "user", "content": "prompt 0"}]},
    ],
)
def test_what_is_not_shown_to_the_judge_is_not_in_a_pairs_key(change):
    assert pair_key(replace(PAIRS[0], **change)) == pair_key(PAIRS[0])


@pytest.mark.parametrize("value", [None, "", "Paris", 3, ["Paris"], {"city": "Paris"}])
def test_what_a_judge_sees_of_the_other_columns_is_in_the_key(value):
    pair = replace(PAIRS[0], extra={"answer": value, "source": 1})
    key = pair_key(pair, ["answer"])
    assert key == pair_key(replace(pair, extra={"answer": value, "source": 2}), ["answer"])
    assert key not in (pair_key(replace(pair, extra={"answer": "Rome"}), ["answer"]), pair_key(pair))


def test_a_label_is_found_by_the_columns_that_it_depends_on(path):
    seen = replace(SETUP, columns=("answer",))
    assert seen.key == SETUP.key  # the prompt's revision covers the columns
    pairs = [replace(pair, extra={"answer": "Paris"}) for pair in PAIRS]
    fill(path, pairs[:2], seen)
    assert found(path, pairs, seen) == {"p0": 0.75, "p1": 0.75}
    assert found(path, [replace(pairs[0], extra={"answer": "Rome"}), pairs[1]], seen) == {"p1": 0.75}
    keys = keys_of(pairs, seen)
    assert Plan(path.with_name("plan"), seen.key, keys[2:], keys).places.tolist() == [2, 3, 4, 5]


def test_any_text_has_a_key():
    assert len({pair_key(replace(PAIRS[0], response_1=text)) for text in ("\ud800", "\0", "ä", "a\u0308", "")}) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"labeler": "direct"},
        {"options": {"debias": "mean_prob", "shots": 0}},
        {"options": {"debias": "mean_logit"}},
        {"judge": "judge-2"},
        {"judge_revision": "r2"},
        {"prompt_revision": "f01"},
    ],
)
def test_each_part_of_a_label_key_is_in_its_key(change):
    assert replace(SETUP, **change).key != SETUP.key


def test_a_label_keys_key_does_not_depend_on_the_order_of_the_options():
    assert replace(SETUP, options=dict(reversed(SETUP.options.items()))).key == SETUP.key


def test_the_prompts_revision_changes_with_each_of_its_files(tmp_path):
    exemplar = {"context": "a", "response_1": "b", "response_2": "c", "rationale": "d", "preferred": 1}
    parts = {**PARTS, "exemplars.jsonl": json.dumps(exemplar)}
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    before = JudgePrompt.load(tmp_path).revision
    assert JudgePrompt.load(tmp_path).revision == before != make_prompt().revision  # the latter has no exemplars
    for name, text in parts.items():
        (tmp_path / name).write_text(json.dumps(exemplar | {"rationale": "e"}) if "exemplars" in name else text + "!")
        assert JudgePrompt.load(tmp_path).revision != before, name
        (tmp_path / name).write_text(text)


# ---- The file -------------------------------------------------------------------------------------------


def test_a_label_comes_back_as_it_was(path):
    label = Label("p0", p=1 / 3, p_12=0.1, p_21=None, mass_12=5e-324, rationale_12=["ä\ud800\u2028", "b\n"], judge="j")
    LabelStore(path).add(SETUP, PAIRS[0], label)
    row = LabelStore(path).find(SETUP, PAIRS)["p0"]
    assert {name: row[name] for name in ("p", "p_12", "p_21", "mass_12", "rationale_12", "judge")} == {
        "p": 1 / 3, "p_12": 0.1, "p_21": None, "mass_12": 5e-324, "rationale_12": ["ä\ud800\u2028", "b\n"], "judge": "j"
    }  # fmt: skip
    assert "score_1" not in row and "skipped" not in row  # empty fields are left out
    assert path.read_bytes().count(b"\n") == 1


def test_a_label_key_finds_its_own_labels_alone(path):
    fill(path, PAIRS[:3])
    fill(path, PAIRS[:2], replace(SETUP, labeler="direct"), p=0.1)
    assert found(path) == {"p0": 0.75, "p1": 0.75, "p2": 0.75}
    assert found(path, label_key=replace(SETUP, labeler="direct")) == {"p0": 0.1, "p1": 0.1}
    assert found(path, label_key=replace(SETUP, judge="nobody")) == {}


def test_pairs_with_the_same_texts_share_a_label(path):
    fill(path, PAIRS[:1])
    renamed = [replace(PAIRS[0], id="a"), replace(PAIRS[0], id="b", category="x")]
    assert found(path, renamed) == {"a": 0.75, "b": 0.75}


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_last_line_that_was_cut_off_is_removed(path, cut):
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    store = LabelStore(path)
    assert store.broken == 0 and found(path).keys() == {f"p{i}" for i in range(5)}
    # The next label gets its own line.
    store.add(SETUP, PAIRS[5], Label("p5", p=0.25))
    assert found(path) == dict.fromkeys(("p0", "p1", "p2", "p3", "p4"), 0.75) | {"p5": 0.25}
    assert LabelStore(path).broken == 0


def test_a_file_of_nothing_but_half_a_line(path):
    path.write_bytes(b'{"id": "p0", "p')
    assert found(path) == {} and path.read_bytes() == b""


@pytest.mark.parametrize("broken", [b"{", b"[1]", b"3", b'{"p": 1}', b'{"setup": [], "pair": "x"}', b"\xff\xfe", b"\0"])
def test_a_broken_line_is_passed_over_and_counted(path, broken):
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], broken + b"\n", *lines[3:]]))
    assert LabelStore(path).broken == 1
    assert len(found(path)) == 6


def test_of_many_broken_lines_a_few_are_named(path, capsys):
    fill(path)
    path.write_bytes(path.read_bytes() + b"{\n" * 100)
    assert LabelStore(path).broken == 100
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.count("the line is damaged") == 5 and "95 more lines are damaged" in said


def test_a_changed_digit_of_a_label_is_noticed(path, capsys):
    fill(path)
    path.write_text(path.read_text().replace('"p": 0.75', '"p": 0.15', 1))
    assert LabelStore(path).broken == 1 and len(found(path)) == 5
    assert f"{path}:1: the line is damaged" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("p", ["1.5", "-0.1", "NaN", "Infinity", "true", '"0.5"', "[]"])
@pytest.mark.parametrize("name", ["p", "p_21", "mass_12", "ratings_1", "ratings_2"])
def test_what_is_no_probability_is_refused_with_its_line(path, name, p):
    fill(path, PAIRS[:2])
    value = f"[0.5, {p}]" if name.startswith("ratings") else p
    path.write_text(path.read_text() + f'{{"id": "p9", "setup": "s", "pair": "x", "p": 0.5, "{name}": {value}}}\n')
    with pytest.raises(UserError, match=f"'{name}' is .*from 0 to 1") as caught:
        LabelStore(path)
    assert caught.value.problems[0].where == f"{path}:3"


def test_a_file_that_was_cut_off_and_then_joined_with_another(tmp_path, path):
    """The half line and the other file's first line form one broken line: both pairs are asked again."""
    fill(tmp_path / "a", PAIRS[:3])
    fill(tmp_path / "b", PAIRS[3:])
    path.write_bytes((tmp_path / "a").read_bytes()[:-40] + (tmp_path / "b").read_bytes())
    assert LabelStore(path).broken == 1
    assert found(path).keys() == {"p0", "p1", "p4", "p5"}


def test_files_may_be_joined_in_any_order(tmp_path, path):
    for name, pairs, label_key in (
        ("a", PAIRS[:2], SETUP),
        ("b", PAIRS[2:], SETUP),
        ("c", PAIRS, replace(SETUP, judge="x")),
    ):
        fill(tmp_path / name, pairs, label_key)
    parts = [(tmp_path / name).read_bytes() for name in "abc"]
    path.write_bytes(b"".join(parts))
    forwards = LabelStore(path).find(SETUP, PAIRS)
    path.write_bytes(b"".join(reversed(parts)))
    assert LabelStore(path).find(SETUP, PAIRS) == forwards and len(forwards) == 6


def test_of_several_lines_with_the_same_keys_the_last_one_counts(path):
    fill(path, PAIRS[:2], p=0.1)
    fill(path, PAIRS[:1], p=0.9)
    assert found(path) == {"p0": 0.9, "p1": 0.1}
    assert len(path.read_bytes().splitlines()) == 3  # nothing is removed


def test_what_is_there_word_for_word_adds_no_line(path):
    """A pair that is too long for the judge is tried in every pass, and a killed run has more passes."""
    skipped = Label("p0", judge="j", skipped="too long")
    for _ in range(3):
        LabelStore(path).add(SETUP, PAIRS[0], skipped)
    assert len(path.read_bytes().splitlines()) == 1
    LabelStore(path).add(SETUP, PAIRS[0], Label("p0", p=0.5, judge="j"))
    LabelStore(path).add(SETUP, PAIRS[0], skipped)
    assert [json.loads(line)["p"] for line in path.read_bytes().splitlines()] == [None, 0.5, None]


# ---- A pass over the data -------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    """Makes a plan as a pass does, with the ids of its pairs."""

    def make(missing, everything=PAIRS, label_key=SETUP):
        found = Plan(tmp_path / "plan.jsonl", label_key.key, keys_of(missing), keys_of(everything))
        found.ids = [everything[place].id for place in found.places]
        return found

    return make


def ids(plan):
    return plan.ids


def test_a_pass_that_was_killed_goes_on_with_the_pairs_that_it_began_with(plan):
    assert ids(plan(PAIRS[1:])) == ["p1", "p2", "p3", "p4", "p5"]
    assert ids(plan(PAIRS[4:])) == ["p1", "p2", "p3", "p4", "p5"]  # the batches depend on all of them
    assert ids(plan(list(reversed(PAIRS[1:])))) == ["p1", "p2", "p3", "p4", "p5"]


def test_a_plan_of_other_settings_is_ignored(plan):
    plan(PAIRS)
    assert ids(plan(PAIRS[4:], label_key=replace(SETUP, judge="x"))) == ["p4", "p5"]


def test_pairs_that_appeared_since_are_not_forgotten(plan):
    """With pairs that the plan does not contain, it is rebuilt from all pairs without a label."""
    plan(PAIRS[:4], PAIRS[:4])
    assert ids(plan(PAIRS[2:])) == ["p2", "p3", "p4", "p5"]
    assert ids(plan(PAIRS[3:])) == ["p2", "p3", "p4", "p5"]


def test_pairs_that_are_gone_are_not_asked(plan):
    plan(PAIRS)
    assert ids(plan(PAIRS[3:5], PAIRS[:5])) == ["p3", "p4"]


def test_a_pass_that_was_killed_after_its_last_label_knows_its_pairs(plan):
    assert ids(plan([])) == []
    plan(PAIRS[1:])
    assert ids(plan([])) == ["p1", "p2", "p3", "p4", "p5"]


def test_what_was_noted_last_is_found_again(plan):
    first = plan(PAIRS)
    first.note(seconds=1.5, precision={"precision": "high"})
    first.note(seconds=0.1 + 0.2)
    with first.path.open("a") as file:
        file.write('{"seconds": 9')  # as after a kill
    again = plan([])
    assert again.noted == first.noted == {"seconds": 0.1 + 0.2, "precision": {"precision": "high"}}
    again.note(seconds=1.0)
    assert plan([]).noted["seconds"] == 1.0
    assert plan(PAIRS, label_key=replace(SETUP, judge="x")).noted == {}


def test_pairs_with_the_same_texts_are_asked_once(plan):
    twins = [*PAIRS, replace(PAIRS[0], id="twin")]
    first = ids(plan(twins, twins))
    assert len(first) == 6 and {"p0", "twin"} & set(first)
    assert ids(plan(twins[3:], twins)) == first
