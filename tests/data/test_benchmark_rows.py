"""Files in RewardBench's formats, and errors in them, by line."""

from __future__ import annotations

import json

import pytest

from trl_rlaif import UserError
from trl_rlaif.data.benchmark import load_benchmark

ASKED = [{"role": "user", "content": "why?"}]


@pytest.fixture
def load(tmp_path):
    def read(*rows):
        path = tmp_path / "bench.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_benchmark(path)

    return read


def test_rewardbench(load):
    row = {"prompt": "why?", "chosen": "so", "chosen_model": "x", "rejected": "", "subset": "hep-cpp", "id": 7}
    assert load(row, {**row, "subset": None}, row)[0].subset == "hep-cpp"  # ids may repeat
    (found,) = load(row | {"prompt": ASKED, "section": "Reasoning"})
    assert (found.id, found.section, found.prompt, found.ties) == ("7", "Reasoning", ASKED, None)
    assert (found.chosen, found.rejected) == (("so",), ("",))


def test_rewardbench_2(load):
    row = {"id": "ref:3", "prompt": "a color?", "chosen": ["red"], "rejected": ["dog", "fox"], "subset": "Ties"}
    tied = row | {"id": "tied:3", "chosen": ["red", "blue"], "num_correct": 2, "total_completions": 4}
    math = {"prompt": "1?", "chosen": ["1"], "rejected": ["2", "3", "4"], "subset": "Math", "num_correct": 1}
    found = load(row, tied, math)
    assert [each.ties for each in found] == [("ref", 3), ("tied", 3), None]
    assert [(each.chosen, each.rejected) for each in found[1:]] == [
        (("red", "blue"), ("dog", "fox")),
        (("1",), ("2", "3", "4")),
    ]


def test_conversations(load):
    """As in TRL's preference format: with the prompt before the answer, or the answer alone."""
    sides = {"chosen": {"role": "assistant", "content": "so"}, "rejected": {"role": "assistant", "content": "no"}}
    whole = {key: [*ASKED, turn] for key, turn in sides.items()} | {"subset": "a"}
    alone = {key: [turn] for key, turn in sides.items()} | {"prompt": ASKED}
    for found in (*load(whole), *load(alone)):
        assert (found.prompt, found.chosen, found.rejected) == (ASKED, ("so",), ("no",))


GOOD = {"prompt": "a?", "chosen": ["b"], "rejected": ["c"], "subset": "Math"}
TIES = {"subset": "ties", "id": "tied:1", "chosen": ["b", "d"]}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a?", "chosen": "b"}, "The row has no 'rejected'"),
        (GOOD | {"prompt": None}, "The row has no prompt"),
        (GOOD | {"chosen": 3}, "'chosen' is a number. Write a text or a list of texts"),
        (GOOD | {"rejected": []}, "'rejected' is an empty list"),
        (GOOD | {"rejected": ["c", 4]}, "'rejected' holds a number"),
        (GOOD | {"chosen": ["b", "d"]}, "'chosen' has 2 responses. Only the subset Ties has several"),
        (GOOD | {"num_correct": 2}, "'num_correct' is 2, and 'chosen' has 1 responses"),
        (GOOD | TIES | {"id": "1"}, "In the subset Ties the id is '1'. Write ref:N or tied:N"),
        (GOOD | TIES | {"id": "ref:1"}, "The row ref:1 has 2 right responses"),
        (GOOD | TIES | {"chosen": "b"}, "The row tied:1 has 1 right responses"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(load, row, what):
    with pytest.raises(UserError) as error:
        load(GOOD, row)
    (problem,) = error.value.problems
    assert problem.where.endswith("bench.jsonl:2") and str(problem).split(": ", 1)[1].startswith(what)


def test_rows_that_ties_lack(load):
    both = [GOOD | TIES, GOOD | TIES | {"id": "ref:1", "chosen": "b"}]
    assert len(load(*both)) == 2
    with pytest.raises(UserError, match="bench.jsonl:3: The id 'tied:1' is already used at .*bench.jsonl:1"):
        load(*both, both[0])
    with pytest.raises(UserError, match="no prompt in both forms"):
        load(both[0], both[1] | {"id": "ref:2"})
