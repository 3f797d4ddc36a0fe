"""check_data_selector passes selectors that keep the contract, and reports each violation."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from trl_rlaif_rehearsal import PromptSelection, RejectionSampling, SelectiveRehearsal

from trl_rlaif import DataSelector, Selection
from trl_rlaif.testing import check_data_selector, make_pool


class Better(DataSelector):
    """Keeps the contract; each broken selector changes one thing."""

    def select(self, pool):
        return np.flatnonzero(pool.scores.numpy() >= pool.scores.median().item())


@pytest.mark.parametrize(
    "selector",
    [
        Better,
        PromptSelection(hard=0.7, stratify="cluster"),
        PromptSelection(stratify="category"),
        RejectionSampling(keep="above", threshold=[0.0, 0.5]),
        SelectiveRehearsal(criterion={"entropy": 1, "length": -1}, clusters=2, per_cluster=2),
    ],
    ids=lambda component: getattr(component, "__name__", type(component).__name__),
)
def test_good_selectors_pass(selector):
    check_data_selector(selector)


def test_with_a_pool_of_ones_own():
    pool = make_pool(columns={"human": [float(i) for i in range(8)]}, num_responses=1)
    check_data_selector(SelectiveRehearsal(criterion="human", clusters=2), pool=pool)


class NoResponses(Better):
    num_responses = 0


class GivesNothing(Better):
    def select(self, pool):
        return []


class GivesAText(Better):
    def select(self, pool):
        return "all"


class GivesAMask(Better):
    def select(self, pool):
        return (pool.scores > 0).tolist()


class GivesFractions(Better):
    def select(self, pool):
        return [len(pool) / 2]


class FromOne(Better):
    def select(self, pool):
        return range(1, len(pool) + 1)


class StrataAlone(Better):
    def select(self, pool):
        return Selection(strata=pool.categories)


class TooManyStrata(Better):
    def select(self, pool):
        return Selection([0], strata=pool.categories)


class RehearsesTexts(Better):
    def select(self, pool):
        return Selection(rehearsal=pool.responses)


class RehearsesNothing(Better):
    """Even if the response is empty."""

    def select(self, pool):
        return Selection(rehearsal=[pool.pair(0, why="first")])


class NoScore(Better):
    def select(self, pool):
        return Selection(rehearsal=[replace(pool.pair(0, why="first"), score=float("nan"))])


class FewClusters(Better):
    def select(self, pool):
        return Selection(clusters=[0])


class FlatEmbeddings(Better):
    def select(self, pool):
        return Selection(clusters=[0] * len(pool), embeddings=pool.embeddings[:, 0])


class Sorts(Better):
    def select(self, pool):
        pool.prompts.sort(key=str)
        return [0]


class Dice(Better):
    def select(self, pool):
        return random.sample(range(len(pool)), 1)


class Remembers(Better):
    def select(self, pool):
        self.last = getattr(self, "last", -1) + 1
        return [self.last]


class Stuck(Better):
    def select(self, pool):
        return Selection([0], strata=[lambda: 0])


class NeedsTwo(Better):
    def select(self, pool):
        return [int(pool.scores.topk(2).indices[1])]


class NeedsCategories(Better):
    def select(self, pool):
        return [i for i, name in enumerate(pool.categories) if name.startswith("a")]


BROKEN = [
    (NoResponses, "num_responses is 0", "1 or more"),
    (GivesNothing, "leaves no prompt to train on", "UserError"),
    (GivesAText, "returns a str", "indices of the pool"),
    (GivesAMask, "returns a mask", "flatnonzero"),
    (GivesFractions, "returns 8.0, which is no index", "whole numbers"),
    (FromOne, "chose the index 8 of a pool of 8", "counted from 0"),
    (StrataAlone, "strata without prompts", "its label"),
    (TooManyStrata, "strata that do not belong", "one label"),
    (RehearsesTexts, "rehearses a list", "pool.pair("),
    (RehearsesNothing, "select() on a pool of empty responses rehearses an empty", "Leave out rows"),
    (NoScore, "rehearses a pair whose score is nan", "Leave it out"),
    (FewClusters, "1 clusters for 8 rows", "every row"),
    (FlatEmbeddings, "embeddings of the shape (8,)", "(8, H)"),
    (Sorts, "changes the pool", "Copy what you change"),
    (Dice, "choose differently from the same pool", "pool.seed"),
    (Remembers, "remembers an earlier selection", "pool.selection"),
    (Stuck, "cannot be sent to other processes", "numbers, texts and arrays"),
    (NeedsTwo, "select() on a pool of one prompt raises RuntimeError", "Make it cope"),
    (NeedsCategories, "select() on a pool without categories raises AttributeError", "Make it cope"),
]


@pytest.mark.parametrize(("selector", "what", "fix"), BROKEN, ids=[broken[0].__name__ for broken in BROKEN])
def test_what_is_broken_is_named(selector, what, fix):
    pool = make_pool(num_responses=1) if selector is not GivesFractions else make_pool(16, 1)
    with pytest.raises(AssertionError) as caught:
        check_data_selector(selector, pool=pool)
    message = str(caught.value)
    assert message.startswith(f"{selector.__name__}: ") and what in message and fix in message
