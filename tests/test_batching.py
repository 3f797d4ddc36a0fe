"""Batches depend only on lengths and keep their budgets; padding is in the right place."""

from __future__ import annotations

import random

import pytest

from trl_rlaif.batching import (
    TokenRows,
    equal_lengths,
    length_batches,
    packed_batches,
    pad_rows,
    shared_prefix,
    token_batches,
)

LENGTHS = [random.Random(seed).choices(range(1, 90), k=70) for seed in range(3)]


def padded_size(lengths):
    return len(lengths) * max(lengths)


BATCHERS = {"padded": (token_batches, padded_size), "packed": (packed_batches, sum), "counted": (length_batches, len)}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("budget", [90, 200, 1000, 10**6])
@pytest.mark.parametrize("name", BATCHERS)
def test_every_index_once_in_batches_as_full_as_they_can_be(name, budget, lengths):
    batcher, size = BATCHERS[name]
    batches = batcher(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    found = [[lengths[i] for i in batch] for batch in batches]
    assert all(size(batch) <= budget for batch in found)
    for batch, following in zip(found, found[1:], strict=False):
        assert size([*batch, following[0]]) > budget
        assert min(batch) >= max(following)


@pytest.mark.parametrize("batcher", [token_batches, packed_batches])
def test_the_longest_come_first_and_ties_keep_their_order(batcher):
    assert batcher([3, 5, 3, 5, 1], 10) == [[1, 3], [0, 2, 4]]
    assert length_batches([3, 5, 3, 5, 1], 2) == [[1, 3], [0, 2], [4]]


def test_what_is_longer_than_the_budget_is_alone():
    assert token_batches([50, 4, 120, 4], 100) == [[2], [0, 1], [3]]
    assert token_batches([101, 100, 99], 100) == packed_batches([101, 100, 99], 100) == [[0], [1], [2]]
    assert token_batches([100, 1], 50) == [[0], [1]]
    assert packed_batches([50, 4, 120, 4], 100) == [[2], [0, 1, 3]]
    assert packed_batches([5, 3, 4], 1) == [[0], [2], [1]]


@pytest.mark.parametrize("budget", [1, 50, 200, 10**6])
def test_with_slack_a_batch_is_of_like_length(budget):
    lengths = [40, 7, 90, 41, 39, 88, 90, 6, 33]
    groups = token_batches(lengths, budget, slack=0.8)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = lengths[group[0]]
        assert longest == max(lengths[i] for i in group)
        assert len(group) == 1 or (longest * len(group) <= budget and min(lengths[i] for i in group) >= 0.8 * longest)
    if budget == 10**6:
        assert [len(group) for group in groups] == [3, 4, 2]


def test_nothing_makes_no_batch():
    assert token_batches([], 100) == packed_batches([], 100) == length_batches([], 3) == equal_lengths([]) == []


def test_equal_lengths_shortest_first():
    assert equal_lengths([3, 1, 3, 2, 1]) == [[1, 4], [3], [0, 2]]


def test_padding_on_either_side():
    ids, mask = pad_rows([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = pad_rows(iter([[5, 6, 7], [], [8]]), left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [0, 0, 8]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, False, True]]


def test_shared_prefix():
    assert shared_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert shared_prefix([[1, 2, 3], [1, 2, 4], [1, 5]]) == 1
    assert shared_prefix([[1, 2], [3, 4]]) == 0
    assert shared_prefix([[1, 2, 3], [1, 2]]) == 1  # at least one token of each is left out
    assert shared_prefix([[1, 2, 3]]) == 2
    assert shared_prefix([[1, 2, 3], [1, 2, 3, 4, 5]], least=2) == 1
    assert shared_prefix([[1], [1]], least=3) == 0


def test_shared_prefix_in_any_order():
    draw = random.Random(0)
    begun = draw.choices(range(9), k=10)
    rows = [[*begun, *draw.choices(range(9), k=k)] for k in (3, 8, 5)]
    expected = next(i for i in range(99) if len({tuple(row[: i + 1]) for row in rows}) > 1)
    for turn in range(3):
        assert shared_prefix(rows[turn:] + rows[:turn]) == expected


def test_token_rows_are_the_lists_that_were_appended():
    wanted, rows = [[5, 2**31 - 1], [], [7]], TokenRows()
    for row in wanted:
        rows.append(row)
    assert list(rows) == wanted and len(rows) == 3 and rows[-1] == [7] and type(rows[0]) is list
    with pytest.raises(IndexError):
        rows[3]
