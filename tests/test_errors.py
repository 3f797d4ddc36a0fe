"""One message for a problem, however many rows have it."""

from __future__ import annotations

from trl_rlaif.errors import Problem, UserError


def test_a_problem_of_many_rows_is_told_once():
    rows = [Problem("'prompt' is empty.", f"a.jsonl:{i}", "Write one.") for i in range(1, 41)]
    error = UserError.from_problems([*rows, Problem("Another.", "b.jsonl:1")])
    assert str(error) == (
        "a.jsonl:1: 'prompt' is empty. Write one.\n"
        "    The same at a.jsonl:2, a.jsonl:3, a.jsonl:4 and 36 more.\n"
        "b.jsonl:1: Another."
    )
    assert len(error.problems) == 41


def test_the_same_problem_at_the_same_place_is_told_once():
    assert str(UserError.from_problems([Problem("No.", "a:1"), Problem("No.", "a:1")])) == "a:1: No."
