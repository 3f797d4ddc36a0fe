"""Work divided among processes: each unit once and in order, and one failing process ends all."""

from __future__ import annotations

import pytest
from helpers import divided_processes
from helpers.divided_processes import UNITS
from helpers.processes import fork

from trl_rlaif import UserError, distributed


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The results of three processes."""
    return fork(divided_processes.__file__, tmp_path_factory.mktemp("three"), count=3)


def test_each_unit_is_computed_once_and_known_to_all_in_order(three):
    expected = list(zip(UNITS, UNITS.upper(), strict=True))
    assert [result["shared"]["found"] for result in three] == [expected] * 3
    assert [result["shared"]["mine"] for result in three] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def test_outside_each_process_computes_everything(three):
    assert [result["shared"]["all"] for result in three] == [list(UNITS)] * 3
    assert three[2]["shared"]["outside"] == three[0]["shared"]["found"]


def test_the_first_process_is_asked_and_the_others_are_told(three):
    told = [result["told"] for result in three]
    assert [each["told"] for each in told] == [[0, 10, 20]] * 3 and [each["agreed"] for each in told] == [0] * 3
    assert [each["asked"] for each in told] == [[0, 0], [1], [2]]  # the last call is outside of ``dividing``
    assert [each["own"][0] for each in told] == [0, 1, 2]


def test_one_that_fails_ends_all_after_what_came_before(three):
    first, second, third = (result["failed"] for result in three)
    assert first["seen"] == second["seen"] == third["seen"] == ["a", "b", "c"]
    assert second["unit"][0] == first["unit"][0] == "UserError" and second["unit"][1].startswith("No e.")
    assert first["unit"][1] == third["unit"][1] == f"Process 1 failed: {second['unit'][1]}"
    assert first["first"] == "ZeroDivisionError: by zero"
    assert second["first"] == third["first"] == "RunError: Process 0 failed: ZeroDivisionError: by zero"


@pytest.mark.parametrize(
    ("batch", "count", "share"),
    [((4, 4), 1, (4, 4)), ((4, 4), 2, (4, 2)), ((4, 1), 2, (2, 1)), ((2, 4), 8, (1, 1)), ((6, 2), 3, (4, 1)),
     ((4, 3), 2, (3, 2)), ((8, 1), 8, (1, 1))],
)  # fmt: skip
def test_a_share_of_a_batch_has_as_many_rows_for_each_and_no_more_at_once(monkeypatch, batch, count, share):
    monkeypatch.setattr(distributed, "processes", lambda: count)
    assert distributed.share_of_batch(*batch) == share
    assert count * share[0] * share[1] == batch[0] * batch[1] and share[0] <= batch[0]


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    with pytest.raises(UserError, match="4 x 2 rows cannot be divided among 3 processes"):
        distributed.share_of_batch(4, 2)
