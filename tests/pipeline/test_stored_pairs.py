"""Pairs that stay on the disk, and the preferences that are made of them part by part."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Value, load_from_disk
from helpers.recipes import write_rows

from trl_rlaif import Pair, UserError
from trl_rlaif.files import sealed
from trl_rlaif.pipeline import preferences
from trl_rlaif.pipeline.context import Shard, pair_row
from trl_rlaif.pipeline.stored_pairs import StoredPairs

PAIRS = [Pair(f"p{i}", f"ä\u2028{i}\r", "yes\n" * i, f"no {i}", "ab"[i % 2], i % 3 or None, {"i": i}) for i in range(7)]


@pytest.fixture
def path(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [sealed(pair_row(pair)) for pair in PAIRS])


def test_pairs_are_those_of_the_file(path):
    pairs = StoredPairs(path)
    assert len(pairs) == 7 and list(pairs) == PAIRS == [pairs[i] for i in range(7)]
    assert pairs[-1] == PAIRS[-1] and list(pairs[5:1:-2]) == PAIRS[5:1:-2] and list(pairs[1:][:3]) == PAIRS[1:4]
    assert list(pairs.at(np.array([3, 0, 3]))) == [PAIRS[3], PAIRS[0], PAIRS[3]]
    assert list(Shard(2, 3).of(pairs)) == PAIRS[1::3]
    with pytest.raises(IndexError):
        pairs[7]


def test_a_file_larger_than_a_block(path, monkeypatch):
    monkeypatch.setattr("trl_rlaif.pipeline.stored_pairs._BLOCK", 5)
    assert list(StoredPairs(path)) == PAIRS


def test_a_missing_file_has_no_pairs(tmp_path):
    assert list(StoredPairs(tmp_path / "pairs.jsonl")) == []


def test_a_damaged_line_is_named(path):
    path.write_bytes(path.read_bytes().replace(b'"no 4"', b'"no 5"'))
    pairs = StoredPairs(path)
    assert pairs[3] == PAIRS[3]
    with pytest.raises(UserError, match="damaged.*Restore") as caught:
        list(pairs[4:])
    assert caught.value.problems[0].where == f"{path}:5"


# ---- preferences/ -----------------------------------------------------------------------------------------


def make(tmp_path, pairs, p, **options):
    """The rows and the columns' types of preferences/."""
    context = SimpleNamespace(folder=tmp_path, chat=lambda prompt: prompt)
    preferences.write_preferences(context, pairs, np.array(p), **options)
    made = load_from_disk(str(tmp_path / "preferences"))
    return made.to_list(), made.features


def message(text, **more):
    return [{"role": "user", "content": text, **more}]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_preferences_do_not_depend_on_the_parts(tmp_path, monkeypatch, at_once):
    """The rows and types are those that `datasets` gives to all rows at once."""
    monkeypatch.setattr(preferences, "_AT_ONCE", at_once)
    pairs = [
        Pair("a", message("x"), "1", "2"),
        Pair("b", message("y", name="n"), "3", "4", "code", 2, {"margin": 0.5}),
        Pair("c", message("z"), "5", "6", None, 1),
    ]
    wanted = [
        {"id": id, "prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected), "p": p, "category": kind,
         "human": human, "margin": margin, "disagreement": spread}
        for id, prompt, chosen, rejected, p, kind, human, margin, spread in (
            ("a", message("x"), "1", "2", 0.75, None, None, 0.0, None),
            ("b", message("y", name="n"), "4", "3", 0.875, "code", True, 0.5, 0.1),
            ("c", message("z"), "6", "5", 1.0, None, False, 0.0, 0.2),
        )
    ]  # fmt: skip
    whole = Dataset.from_list(wanted)
    whole = whole.cast_column("human", Value("bool")).cast_column("category", Value("string"))
    rows, features = make(tmp_path, pairs, [0.75, 0.125, 0.0], disagreement=[None, 0.1, 0.2])
    assert rows == whole.to_list() and features == whole.features
    parts = -(-3 // at_once)
    assert len(list((tmp_path / "preferences").glob("data-*.arrow"))) == parts
    fingerprint = load_from_disk(str(tmp_path / "preferences"))._fingerprint
    make(tmp_path, pairs, [0.75, 0.125, 0.0], disagreement=[None, 0.1, 0.2])
    assert load_from_disk(str(tmp_path / "preferences"))._fingerprint == fingerprint
    make(tmp_path, pairs, [0.75, 0.125, 0.25], disagreement=[None, 0.1, 0.2])
    assert load_from_disk(str(tmp_path / "preferences"))._fingerprint != fingerprint


def answer(text):
    return [{"role": "assistant", "content": text}]


def test_pairs_without_a_probability_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "_AT_ONCE", 1)
    pairs = [Pair(str(i), "x", f"a{i}", f"b{i}", extra={"margin": 1.0}) for i in range(4)]
    rows, features = make(tmp_path, pairs, [0.25, np.nan, 0.5, np.nan])
    assert [(row["id"], row["chosen"], row["p"]) for row in rows] == [("0", "b0", 0.75), ("2", "a2", 0.5)]
    assert list(features) == ["id", "prompt", "chosen", "rejected", "p", "category", "human"]  # nobody chose: no margin
    assert features["category"] == Value("string")
