"""Sources of rows: files, folders and the Hub, and the messages if they cannot be read."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_rlaif.data import load_pairs, load_prompts
from trl_rlaif.errors import UserError

ROWS = [{"id": "a", "prompt": "One?", "source": "x"}, {"id": "b", "prompt": "Zwei für Ö?", "source": "y"}]


def write_jsonl(path: Path, rows: list, **kwargs) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False, **kwargs) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def fails(source, load=load_prompts, **kwargs) -> str:
    """The message of the UserError that loading a source raises."""
    with pytest.raises(UserError) as caught:
        load(source, **kwargs)
    return str(caught.value)


def write_as(path: Path) -> Path:
    if path.name.endswith((".jsonl", ".gz")):
        return write_jsonl(path, ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import datasets

        table = datasets.Dataset.from_list(ROWS)
        table.to_parquet(path) if path.suffix == ".parquet" else table.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json", "f.csv", "f.parquet", "saved", "F.JSONL"])
def test_every_kind_of_source_gives_the_same_prompts(tmp_path, name):
    items = load_prompts(write_as(tmp_path / name)).items
    assert [(item.id, item.prompt, item.extra) for item in items] == [
        ("a", "One?", {"source": "x"}),
        ("b", "Zwei für Ö?", {"source": "y"}),
    ]


def test_a_folder_of_files_and_a_split_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:1])
    assert [item.id for item in load_prompts(folder).items] == ["a", "b"]
    assert [item.id for item in load_prompts(f"{folder}:test").items] == ["a"]
    message = fails(f"{folder}:dev")
    assert "dev" in message and "train" in message and "test" in message


def test_a_saved_dataset_dict_names_its_splits(tmp_path):
    import datasets

    splits = {"eval": datasets.Dataset.from_list([{"prompt": "Hi?", "when": None}])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert load_prompts(f"{tmp_path}/saved:eval").items[0].id == "saved-1"
    assert f"{tmp_path}/saved:eval" in fails(tmp_path / "saved")


def test_automatic_ids_count_rows_and_errors_count_lines(tmp_path):
    path = tmp_path / "many.jsonl.gz"
    path.write_bytes(
        gzip.compress(b'\xef\xbb\xbf\n{"prompt": "a"}\r\n   \n\n\xef\xbb\xbf{"prompt": "b", "id": 7}\n{"prompt": "c"}')
    )
    assert [item.id for item in load_prompts(path).items] == ["many-1", "7", "many-3"]
    path = tmp_path / "many.jsonl"
    path.write_text('\n\n{"prompt": ""}\n')
    assert f"{path}:3: The row has no prompt" in fails(path)


def test_all_problems_of_a_file_are_found_in_one_pass(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": \n[1]\n{"prompt": "\xff"}\n"x"\n{"text": "y"}\n{"prompt": NaN}\n')
    lines = fails(path).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in range(2, 8)]
    for line, part in zip(lines, ["Invalid JSON", "a list", "UTF-8", "a text", "'text'", "no prompt"], strict=True):
        assert part in line


def test_at_most_ten_problems_are_listed_and_the_rest_counted(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": ""}] * 13)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert len(caught.value.problems) == 11
    assert str(caught.value).endswith("... and 3 more problems.")
    assert "more problem" not in fails(write_jsonl(path, [{"prompt": ""}] * 10))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, '{"prompt": "a"}{"prompt": "b"}'])
def test_json_that_breaks_the_parser_is_an_error_of_its_line(tmp_path, text):
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    assert f"{path}:1: " in fails(path)


def test_broken_gzip(tmp_path):
    whole = gzip.compress("".join(json.dumps({"prompt": f"{i * 7919}"}) + "\n" for i in range(10_000)).encode())
    path = tmp_path / "f.jsonl.gz"
    for data in (whole[:-1000], whole[:5000] + b"\0" * 500 + whole[5500:], whole + b"garbage"):
        path.write_bytes(data)
        assert "gzip data is broken" in fails(path).splitlines()[0]
    path.write_bytes(b'{"prompt": "plain"}\n')
    assert "not gzip" in fails(path)
    (tmp_path / "g.jsonl").write_bytes(whole)
    assert ".jsonl.gz" in fails(tmp_path / "g.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_empty_files(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    path.write_bytes(b"")
    message = fails(path)
    assert str(path) in message and ("empty" in message or "Parquet" in message)
    if suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf\n\n")
        assert "empty" in fails(path)


def test_wrong_encodings(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a"}', encoding="utf-16")
    assert "UTF-16" in fails(path)
    for name, text in (("f.json", '[\n{"prompt": "é"}]'), ("f.csv", "prompt\né")):
        (tmp_path / name).write_text(text, encoding="latin-1")
        assert f"{tmp_path / name}:2: The line is not UTF-8." in fails(tmp_path / name)


def test_json_lists(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": }]')
    assert f"{path}:2: Invalid JSON" in fails(path)
    path.write_text('{"data": []}')
    assert "an object, not a list" in fails(path)
    path.write_text('[{"prompt": "a"}, "b", {"prompt": 3}]')
    assert [line.split(": The")[0].split(": 'p")[0] for line in fails(path).splitlines()] == [
        f"{path}: row 2",
        f"{path}: row 3",
    ]


def test_csv_cells(tmp_path):
    path = tmp_path / "f.csv"
    long = "x" * 300_000
    path.write_bytes(f'\ufeffprompt,n\n"two\r\nlines, \u2028""q""",1\n\n{long},\n007,0\n'.encode())
    before = csv.field_size_limit(1000)
    try:
        items = load_prompts(path).items
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)
    assert [item.prompt for item in items] == ['two\r\nlines, \u2028"q"', long, "007"]
    assert [item.extra["n"] for item in items] == ["1", None, "0"]


@pytest.mark.parametrize("written", [json.dumps, str])
def test_messages_in_a_csv(tmp_path, written):
    turns, path = [{"role": "user", "content": 'It\'s "blue"?'}], tmp_path / "f.csv"
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([["prompt"], [written(turns)]])
    assert load_prompts(path).items[0].prompt == turns
    path.write_text('prompt\n"[{not messages}]"\n')
    assert load_prompts(path).items[0].prompt == "[{not messages}]"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('prompt,n\n"never closed,1\nb,2\n', "Invalid CSV"),
        ("prompt,n\na,1\nb,2,3\n", "row 2: The row has 3 cells, and the header has 2."),
        ("prompt,prompt\na,b\n", "'prompt' appears more than once"),
        ("prompt;n\na;b\n", "'prompt;n'"),
        ("prompt,n\n,1\n", "row 1: The row has no prompt"),
        ("prompt,n\n", "empty"),
    ],
)
def test_csv_errors(tmp_path, text, part):
    path = tmp_path / "f.csv"
    path.write_text(text)
    assert part in fails(path)


def test_parquet_values_become_json_values(tmp_path):
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    row = {
        "prompt": "a",
        "day": datetime.date(2024, 1, 2),
        "n": [decimal.Decimal("1.5")],
        "nan": float("nan"),
        "f": 0.5,
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    extra = load_prompts(path).items[0].extra
    assert extra == {"day": "2024-01-02", "n": ["1.5"], "nan": None, "f": 0.5}
    path.write_bytes(b"PAR1 not really")
    assert f"{path}: The Parquet file cannot be read" in fails(path)


def test_a_missing_file_suggests_its_neighbours(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    assert "Did you mean '" + str(tmp_path / "prompts.jsonl") in fails(tmp_path / "promts.jsonl")
    assert "does not exist" in fails(tmp_path / "no" / "promts.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub for a file"))
    assert "Did you mean 'prompts.jsonl'?" in fails("prompt.jsonl")
    assert "Did you mean 'prompts.jsonl'?" in fails("prompts.jsnl")
    assert "no such file" in fails("./prompts")
    assert "no such file" in fails(Path("org/name"))


@pytest.mark.parametrize("source", ["", "  ", "a\0b", "x/y/z", "~nobody/x", "/dev/null", "a" * 5000])
def test_names_that_cannot_be_data(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    fails(source)


def test_other_files_and_empty_folders(tmp_path):
    (tmp_path / "notes.doc").write_text("hello")
    assert ".jsonl.gz" in fails(tmp_path / "notes.doc") and "'.doc'" in fails(tmp_path / "notes.doc")
    (tmp_path / "empty").mkdir()
    assert "holds no data" in fails(tmp_path / "empty")


@pytest.mark.parametrize(("source", "split"), [("org/some-data", "train"), ("org/some-data:test[:5]", "test[:5]")])
def test_hub_ids(monkeypatch, source, split):
    calls = []
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS[:1] + [{"prompt": "c"}],
    )
    assert [item.id for item in load_prompts(source).items] == ["a", "some-data-2"]
    assert calls == [(("org/some-data",), {"split": split})]


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    message = fails("org/some-data", load_pairs)
    assert message.startswith("org/some-data: ") and "no route to host" in message and "network" in message
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_prompts").mkdir()
    assert "Did you mean 'my_prompts'?" in fails("my_promts")


def test_importing_the_module_is_light():
    code = "import sys, trl_rlaif.data; sys.exit(bool({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_files_have_a_prompt_a_line(tmp_path):
    path = tmp_path / "f.txt"
    path.write_bytes("\ufeffOne?\r\n\n  \n Zwei für Ö? \nlast".encode())
    items = load_prompts(path).items
    assert [(item.id, item.prompt) for item in items] == [("f-1", "One?"), ("f-2", " Zwei für Ö? "), ("f-3", "last")]
    path.write_bytes(b"good\nbad \xff\n")
    assert fails(path) == f"{path}:2: Byte 5 of the line is not UTF-8. Save it as UTF-8."
    path.write_bytes(b"\n \n")
    assert "empty" in fails(path)
    path.write_text('{"prompt": "a"}\n')
    assert f"{path}:1: The line is a JSON object, not a prompt. Name the file .jsonl." in fails(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("f.txt.gz", "a\nb\n"), ("f.csv.gz", "prompt\na\nb\n"), ("f.JSON.gz", '[{"prompt": "a"}, {"prompt": "b"}]')],
)
def test_every_text_file_may_be_compressed(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert [(item.id, item.prompt) for item in load_prompts(path).items] == [("f-1", "a"), ("f-2", "b")]
    path.write_bytes(gzip.compress(text.encode() * 200)[:-9])
    assert "gzip data is broken" in fails(path).splitlines()[0]


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        (b"PAR1\x15\x04", "Name it .parquet."),
        (b"PK\x03\x04\x14\x00", "Unpack it."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_data_of_another_kind_is_named_once(tmp_path, data, fix, suffix):
    path = tmp_path / f"f{suffix}"
    path.write_bytes(data)
    message = fails(path)
    assert message.startswith(f"{path}: ") and fix in message and len(message.splitlines()) == 1
