"""Which responses rejection sampling accepts, on pools with known scores."""

from __future__ import annotations

import pytest
import torch
from trl_rlaif_rehearsal.rejection import RejectionSampling

from trl_rlaif import Pool


def _pool(scores, *, responses=None, selection=0, prompts=2):
    """Prompts with equally many responses each, in order; response i is the token i + 3."""
    count = len(scores)
    rows = [i * prompts // count for i in range(count)]
    return Pool(
        prompts=[f"p{row}" for row in rows],
        responses=[f"r{i}" for i in range(count)],
        scores=torch.tensor(scores, dtype=torch.float32),
        categories=[None] * count,
        rows=torch.tensor(rows),
        prompt_ids=[[row] for row in rows],
        response_ids=[[i + 3] for i in range(count)] if responses is None else responses,
        selection=selection,
    )


def _accepted(pool, **options):
    return [pair.response for pair in RejectionSampling(**options).select(pool).rehearsal]


SCORES = [0.1, 0.7, 0.3, 0.5, 0.2, 0.4, 0.35, 0.6]


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({}, ["r1", "r7"]),
        ({"threshold": 0.65}, ["r1"]),
        ({"threshold": 0.9}, []),
        ({"keep": "above", "threshold": 0.4}, ["r1", "r3", "r5", "r7"]),
        ({"keep": "above", "threshold": 0.7}, ["r1"]),  # 0.7 is smaller in float32
        ({"keep": "above", "quantile": 0.0}, [f"r{i}" for i in range(8)]),
        ({"keep": "above", "quantile": 0.5}, ["r1", "r3", "r5", "r7"]),
        ({"keep": "above", "quantile": 0.75}, ["r1", "r7"]),
        ({"keep": "above", "quantile": 1.0}, ["r1"]),
        ({"keep": "above", "quantile": 0.75, "threshold": 0.65}, ["r1"]),
        ({"keep": "best", "quantile": 0.9}, ["r1"]),
    ],
)
def test_what_is_accepted(options, accepted):
    assert _accepted(_pool(SCORES), **options) == accepted


def test_scores_that_are_all_alike_are_all_at_the_quantile():
    assert _accepted(_pool([0.1] * 6), keep="above", quantile=0.9) == [f"r{i}" for i in range(6)]


@pytest.mark.parametrize("keep", ["best", "above"])
def test_a_response_to_one_prompt_counts_once_and_an_empty_one_never(keep):
    responses = [[5], [5], [6], [], [], [5], [], [5]]
    pool = _pool([1, 1, 0, 9, 9, 1, 9, 1], responses=responses)
    options = {"threshold": 0.5} if keep == "above" else {}
    # The same response to another prompt is another pair.
    assert _accepted(pool, keep=keep, **options) == ["r0", "r5"]


def test_the_best_is_that_of_each_row_and_rows_with_one_prompt_are_one_source_of_duplicates():
    pool = _pool([1.0, 2.0, 3.0, 1.0], responses=[[5], [6], [6], [5]])
    pool.prompt_ids[:] = [[7]] * 4  # the same prompt twice in the data
    assert _accepted(pool) == ["r1"]


@pytest.mark.parametrize("name", ["threshold", "quantile"])
def test_a_list_rises_from_selection_to_selection_and_its_last_value_stays(name):
    options = {"keep": "above", name: [0.2, 0.5]}
    at = [_accepted(_pool([0.1, 0.2, 0.5, 0.6], selection=i), **options) for i in range(4)]
    first = ["r1", "r2", "r3"]
    assert at == [first, ["r2", "r3"], ["r2", "r3"], ["r2", "r3"]]


def test_why_is_said_in_words_with_the_numbers():
    options = {"threshold": 0.25, "quantile": 0.5}
    [first, second] = RejectionSampling(**options).select(_pool(SCORES)).rehearsal
    bounds = "at least the threshold 0.25, at least 0.4, the 0.5 quantile of 8 scores"
    assert first.why == f"score 0.7, the best of 4 to its prompt, {bounds}"
    assert (first.score, second.score) == pytest.approx((0.7, 0.6)) and first.prompt_ids == [0]
    [pair] = RejectionSampling(keep="above", threshold=0.65).select(_pool(SCORES)).rehearsal
    assert pair.why == "score 0.7, at least the threshold 0.65"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": [0.5, 0.4]}, "Write increasing numbers"),
        ({"threshold": [0.5, 0.5]}, "Write increasing numbers"),
        ({"quantile": [0.9, 0.5]}, "Write increasing numbers"),
        ({"quantile": []}, "at least one number"),
        ({"quantile": 1.5}, "less than or equal to 1"),
        ({"quantile": [0.5, -0.1]}, "greater than or equal to 0"),
        ({"keep": "above"}, "a threshold or a quantile"),
        ({"keep": "all"}, "'best' or 'above'"),
        ({"num_responses": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RejectionSampling(**options)


def test_the_pool_holds_as_many_responses_as_are_asked_for():
    assert RejectionSampling().num_responses == 4 and RejectionSampling(num_responses=7).num_responses == 7
