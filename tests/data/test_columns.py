"""Custom column names in data files."""

import pytest

from trl_rlaif.data import load_finetuning, load_pairs, load_prompts
from trl_rlaif.errors import UserError


def fails(load, source, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **kwargs)
    return str(caught.value)


def test_prompts(write):
    path = write({"question": "a", "prompt": "not this", "kind": "k", "nr": 7, "other": 1}, {"question": "b"})
    items = load_prompts(path, columns={"prompt": "question", "category": "kind", "id": "nr"}).items
    assert [(item.id, item.prompt, item.category, item.extra) for item in items] == [
        ("7", "a", "k", {"other": 1}),
        ("f-2", "b", None, {}),
    ]


def test_pairs(write):
    path = write({"q": "Q", "a": "x", "b": "y", "vote": 2, "m": 1})
    columns = {"prompt": "q", "response_1": "a", "response_2": "b", "human": "vote", "margin": "m"}
    pair = load_pairs(path, columns=columns).items[0]
    assert (pair.prompt, pair.response_1, pair.response_2, pair.human) == ("Q", "x", "y", 2)
    assert pair.extra == {"margin": 1.0}


def test_two_columns_can_change_places(write):
    path = write({"prompt": "Q", "response_1": "x", "response_2": "y"})
    pair = load_pairs(path, columns={"response_1": "response_2", "response_2": "response_1"}).items[0]
    assert (pair.response_1, pair.response_2) == ("y", "x")


def test_other_loaders(write):
    path = write({"q": "Q", "answer": "A"})
    columns = {"prompt": "q", "completion": "answer"}
    assert load_finetuning(path, names=columns) == [{"prompt": "Q", "completion": "A"}]


def test_a_column_of_another_kind_of_data_need_not_be_there(write):
    assert load_prompts(write({"q": "Q"}), columns={"prompt": "q", "response_1": "a"}).items[0].prompt == "Q"


@pytest.mark.parametrize(
    ("load", "columns", "found"),
    [
        (load_prompts, {"prompt": "qestion"}, "no column 'qestion', which data.columns names as 'prompt'"),
        (
            load_pairs,
            {"prompt": "question", "human": "voted"},
            "no column 'voted', which data.columns names as 'human'",
        ),
        (lambda path, columns: load_finetuning(path, names=columns), {"completion": "c"}, "no column 'c'"),
    ],
)
def test_a_wrong_column_is_an_error_of_the_file(write, load, columns, found):
    row = {"question": "Q", "prompt": "P", "response_1": "x", "response_2": "y", "completion": "z"}
    path = write(row, {**row, "id": 2})
    message = fails(load, path, columns=columns)
    assert message.startswith(f"{path}:1: ") and found in message and "\n" not in message
    assert "'question', 'prompt', 'response_1', 'response_2'" in message
    assert ("Did you mean 'question'?" in message) == ("qestion" in message)


def test_a_wrong_column_of_a_csv(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("question,n\nQ,1\n")
    assert fails(load_prompts, path, columns={"prompt": "Question"}).startswith(f"{path}: row 1: There is no column")


def test_errors_of_rows_name_the_files_own_column(write):
    path = write({"question": "a"}, {"question": 3})
    message = fails(load_prompts, path, columns={"prompt": "question"})
    assert message.startswith(f"{path}:2: 'prompt' is a number. (By data.columns, 'prompt' is the column 'question'.)")


def test_a_column_that_some_rows_lack(write):
    path = write({"question": "a"}, {"prompt": "b"})
    assert "no prompt" in fails(load_prompts, path, columns={"prompt": "question"})


def test_an_empty_file_stays_an_empty_file(write):
    assert "empty" in fails(load_prompts, write(), columns={"prompt": "question"})
