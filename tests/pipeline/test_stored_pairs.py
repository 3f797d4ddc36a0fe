"""Pairs that stay on disk, and preferences that are made from them in parts."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Value, load_from_disk
from helpers.recipes import write_rows

from trl_rlaif import Pair, UserError
from trl_rlaif.files import append_lines, sealed
from trl_rlaif.labels.store import pair_key
from trl_rlaif.pipeline import preferences
from trl_rlaif.pipeline.context import Shard, pair_row
from trl_rlaif.pipeline.stored_pairs import StoredPairs
from trl_rlaif.pipeline.work.sample import _Drawn
from trl_rlaif.report.run_data import read_run

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
    monkeypatch.setattr("trl_rlaif.stored_lines._BLOCK", 5)
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


def peak_of(work):
    """Peak memory of Python objects, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_was_drawn_stays_on_the_disk(tmp_path):
    """1,000 rows of 10 kB; a kill left the first 200 of them and a partial line."""
    text, ids = "x" * 10_000, [f"p{i}" for i in range(1000)]
    path, section = tmp_path / "drawn.jsonl", SimpleNamespace(keep_pairs="first", sampler=None)

    def row(id):
        counts = {"redraws": 0, "responses": 2, "ended": 1, "tokens": 7}
        return {"id": id, "dropped": "empty"} | counts if id == "p7" else {"id": id, "text": f"{text} {id}"} | counts

    append_lines(path, map(row, ids[:200]))
    with path.open("a") as file:
        file.write('{"id": "p2')
    found = []

    def work():
        drawn = _Drawn(path, section)
        assert sum(drawn.add(map(row, ids[start : start + 50])) for start in range(950, -1, -50)) == 800
        found.append((drawn.counts["pairs"], drawn.dropped, drawn.per_response("ended"), drawn.per_response("tokens")))
        assert all(got == row(id) for got, id in zip(drawn.rows(ids), ids, strict=True))

    assert peak_of(work) < 4_000_000
    assert found == [(999, {"empty": 1}, 0.5, 3.5)]


def test_the_report_leaves_pairs_and_labels_on_the_disk(tmp_path):
    (tmp_path / "recipe.yaml").write_text("run: {name: long}\n")
    pairs = [Pair(f"p{i}", f"{i} " * 2000, "yes", f"no {i}", None, 1 + i % 2) for i in range(1000)]
    write_rows(tmp_path / "pairs.jsonl", map(pair_row, pairs))
    labels = ({"id": p.id, "setup": "s", "pair": pair_key(p), "p": 0.25, "rationale_12": "r" * 5000} for p in pairs)
    write_rows(tmp_path / "labels.jsonl", labels)
    write_rows(tmp_path / "results.json", [{"label": {"setup": "s", "columns": []}}])
    runs = []
    assert peak_of(lambda: runs.append(read_run(tmp_path))) < 2_500_000
    (run,) = runs
    assert (run.pairs, run.labels.total, run.labels.second, len(run.labels.pairs)) == (1000, 1000, 1000, 30)
    assert [one.prompt[0].text.split()[0] for one in run.labels.pairs[:3]] == ["0", "33", "66"]


# ---- preferences/ -----------------------------------------------------------------------------------------


def make(tmp_path, pairs, p, **options):
    """The rows and column types of preferences/."""
    context = SimpleNamespace(folder=tmp_path, chat=lambda prompt: prompt)
    preferences.write_preferences(context, pairs, np.array(p), **options)
    made = load_from_disk(str(tmp_path / "preferences"))
    return made.to_list(), made.features


def message(text, **more):
    return [{"role": "user", "content": text, **more}]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_preferences_do_not_depend_on_the_parts(tmp_path, monkeypatch, at_once):
    """Rows and types are the same as if `datasets` got all rows at once."""
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
    assert list(features) == ["id", "prompt", "chosen", "rejected", "p", "category", "human"]  # no human, no margin
    assert features["category"] == Value("string")
