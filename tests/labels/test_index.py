"""The index of labels.jsonl: it always gives the file's own labels, whatever happened to the file or the index."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from trl_rlaif import Label, Pair, RunError
from trl_rlaif.files import naming_a_full_disk
from trl_rlaif.labels import LabelKey, LabelStore
from trl_rlaif.labels import store as store_module

SETUP = LabelKey("distilled", {}, "judge", "r1", "f00")
PAIRS = [Pair(f"p{i}", f"prompt {i}", f"yes {i}", f"no {i}") for i in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


@pytest.fixture
def index(tmp_path):
    return tmp_path / "labels.index"


def fill(path, index=None, pairs=PAIRS, p=0.75):
    with LabelStore(path, index) as store:
        for pair in pairs:
            store.add(SETUP, pair, Label(pair.id, p=p, judge="judge"))


def found(path, index=None):
    """Labels by id, and the number of damaged lines."""
    with LabelStore(path, index) as store:
        return {id: row["p"] for id, row in store.find(SETUP, PAIRS).items()}, store.broken


@pytest.fixture
def lines_read(monkeypatch):
    """The numbers of the lines read for indexing."""
    read, original = [], LabelStore._read

    def counting(store, line, where):
        read.append(int(where.rpartition(":")[2]))
        return original(store, line, where)

    monkeypatch.setattr(LabelStore, "_read", counting)
    return read


def test_only_what_has_come_since_is_read(path, index, lines_read):
    fill(path, pairs=PAIRS[:4])
    found(path, index)
    lines_read.clear()
    assert found(path, index) == (dict.fromkeys(("p0", "p1", "p2", "p3"), 0.75), 0) and lines_read == []
    fill(path, pairs=PAIRS[4:])
    lines_read.clear()
    assert found(path, index) == found(path) and lines_read[:2] == [5, 6]
    lines_read.clear()
    assert len(found(path, index)[0]) == 6 and lines_read == []


def test_a_label_is_found_at_once_and_the_last_one_counts(path, index):
    fill(path, index, p=0.25)
    with LabelStore(path, index) as store:
        store.add(SETUP, PAIRS[1], Label("p1", skipped="too long"))
        row = store.get(SETUP.key, SETUP.of(PAIRS[1]))
        assert row["p"] is None and not store.is_judged(SETUP.key, SETUP.of(PAIRS[1]))
        assert store.is_judged(SETUP.key, SETUP.of(PAIRS[0])) and not store.is_judged("other", SETUP.of(PAIRS[0]))
        assert store.get(replace(SETUP, judge="x").key, SETUP.of(PAIRS[0])) is None
    assert found(path, index)[0]["p1"] is None


def changed_digit(path, index):
    path.write_text(path.read_text().replace('"p": 0.75', '"p": 0.15', 1))


def without_a_line(path, index):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def of_another_file(path, index):
    path.unlink()
    fill(path, pairs=PAIRS[3:], p=0.5)


def longer_file(path, index):
    path.unlink()
    fill(path, pairs=PAIRS + [replace(PAIRS[0], response_1=str(i)) for i in range(20)], p=0.5)


def no_file(path, index):
    path.unlink()


def cut_off(path, index):
    path.write_bytes(path.read_bytes()[:-40])


def garbage(path, index):
    index.write_bytes(b"garbage" * 1000)


def half(path, index):
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2 // 4096 * 4096])


def empty(path, index):
    index.write_bytes(b"")


@pytest.mark.parametrize(
    "change",
    [changed_digit, without_a_line, of_another_file, longer_file, no_file, cut_off, garbage, half, empty],
    ids=lambda change: change.__name__,
)
def test_an_index_that_does_not_fit_is_made_again(path, index, change):
    fill(path)
    assert len(found(path, index)[0]) == 6
    change(path, index)
    assert found(path, index) == found(path)
    fill(path, index, p=0.9)
    assert found(path, index)[0] == found(path)[0] == {pair.id: 0.9 for pair in PAIRS}


@pytest.mark.parametrize(
    "change", ["UPDATE labels SET place = place + 1", "UPDATE labels SET place = 0", "DROP TABLE labels"]
)
def test_a_place_that_is_wrong_ends_the_run_once(path, index, change):
    fill(path)
    found(path, index)
    with LabelStore(path, index) as store:
        tables = sqlite3.connect(index)
        tables.execute(change)
        tables.commit()
        tables.close()
        with pytest.raises(RunError, match="index of the labels is damaged.*--resume"):
            store.find(SETUP, PAIRS)
    assert len(found(path, index)[0]) == 6


def test_a_kill_at_any_moment_loses_no_label(path, index, monkeypatch):
    """The process dies at once, as with kill -9, before a line is indexed or before the index is committed."""
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_index import PAIRS, SETUP, Label, LabelStore, store_module
store_module._AT_ONCE = 2
store = LabelStore(Path(sys.argv[2]), Path(sys.argv[3]))
for pair in PAIRS[: int(sys.argv[4])]:
    store.add(SETUP, pair, Label(pair.id, p=0.75))
os._exit(9)
"""
    for count in (1, 4, 6):
        arguments = [sys.executable, "-c", script, os.path.dirname(__file__), path, index, str(count)]
        assert subprocess.run(arguments, env={**os.environ, "RANK": "0"}, check=False).returncode == 9
        assert len(found(path)[0]) == count  # from the file alone
        assert found(path, index) == found(path)


def test_a_full_disk_is_one_message(path, index, tmp_path):
    fill(path)
    with LabelStore(path, index) as store:
        store._index._tables.execute("PRAGMA max_page_count = 1")
        others = [replace(PAIRS[0], response_1=str(i)) for i in range(200)]
        with pytest.raises(RunError, match="The disk is full"), naming_a_full_disk(tmp_path):
            for pair in others:
                store.add(SETUP, pair, Label(pair.id, p=0.5, judge="judge"))
    fill(path, index, others, p=0.5)
    assert path.read_bytes().count(b"\n") == 206 and found(path, index) == found(path)


def test_what_another_process_is_writing_waits(path, index, monkeypatch):
    """Only the first process writes; the others keep their own index and touch no file."""
    fill(path, pairs=PAIRS[:2])
    monkeypatch.setattr(store_module, "is_first", lambda: False)
    with LabelStore(path, index) as store:
        line = path.read_bytes().splitlines(keepends=True)[0]
        fill_line = json.dumps({"id": "p2", "p": 0.5, "setup": SETUP.key, "pair": SETUP.of(PAIRS[2])}).encode() + b"\n"
        with path.open("ab") as file:
            file.write(line + fill_line[:30])
        assert len(store.find(SETUP, PAIRS)) == 2 and path.stat().st_size % len(line) != 0
        with path.open("ab") as file:
            file.write(fill_line[30:])
        assert {id: row["p"] for id, row in store.find(SETUP, PAIRS).items()} == {"p0": 0.75, "p1": 0.75, "p2": 0.5}
    assert not index.exists()


def test_labels_are_synced_once_in_a_while(path, index, monkeypatch):
    synced, clock, fsync = [], iter(range(0, 10**6)), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(1), fsync(number)))
    monkeypatch.setattr(store_module.time, "monotonic", lambda: 100 + next(clock) * 0.01)
    fill(path, index, [replace(PAIRS[0], response_1=str(i)) for i in range(250)])
    assert 3 <= len(synced) <= 5  # the first, once a second, and at the end
