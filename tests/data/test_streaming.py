"""Pairs read one at a time, from files larger than memory, are the same as all at once."""

from __future__ import annotations

import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from helpers.recipes import write_rows

from trl_rlaif import UserError
from trl_rlaif.data import load_pairs, stream_pairs

ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}" if i % 5 else f"good {i}"} for i in range(50)]

HOW = {"columns": None, "format": "auto", "category": "category", "seed": 42, "scored": "all"}


def sources(folder):
    """The same rows in every kind of source that can be streamed."""
    write_rows(folder / "rows.jsonl", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=20)
    Dataset.from_list(ROWS).save_to_disk(folder / "rows")
    return [folder / "rows.jsonl", folder / "rows.parquet", folder / "rows"]


def test_a_stream_has_the_pairs_of_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_rlaif.data.rows._AT_ONCE", 7)
    for source in sources(tmp_path):
        loaded, stream = load_pairs(source, seed=1), stream_pairs(source, **HOW | {"seed": 1})
        assert len(loaded.items) == 40 and loaded.skip_counts() == {"responses are identical": 10}
        for _ in range(2):  # each pass starts over, also with the ids it has seen
            assert list(stream.items) == loaded.items
            assert stream.skipped == loaded.skipped and stream.skip_counts() == loaded.skip_counts()


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "p", "chosen": 1, "rejected": "x"}])
    passed = stream_pairs(rows, **HOW).items
    assert [next(passed).prompt for _ in range(3)] == ["p1", "p2", "p3"]
    with pytest.raises(UserError, match="rows.jsonl:51") as caught:
        list(passed)
    with pytest.raises(UserError) as at_once:
        load_pairs(rows)
    assert str(caught.value) == str(at_once.value)


def test_of_a_parquet_file_memory_holds_a_part(tmp_path):
    path, text = tmp_path / "rows.parquet", "x" * 1000
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "chosen", "rejected")])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, 8000, 1000):
            rows = [{"prompt": f"{i}", "chosen": f"{text}{i}", "rejected": text} for i in range(start, start + 1000)]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_pairs(path, **HOW).items) == 8000
        assert tracemalloc.get_traced_memory()[1] < 10e6  # for 16 MB of text
    finally:
        tracemalloc.stop()
