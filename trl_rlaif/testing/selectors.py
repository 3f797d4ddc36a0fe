"""The contract of a data selector, line by line."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from trl_rlaif.components import DataSelector
from trl_rlaif.testing.checks import Subject, same, seeded
from trl_rlaif.testing.data import HOSTILE, make_pool
from trl_rlaif.types import Pool, Selection
from trl_rlaif.validation import check_num_responses, check_selection


def check_data_selector(selector: DataSelector | type[DataSelector], *, pool: Pool | None = None) -> None:
    """Check that a data selector keeps its contract.

    Indices of the pool that are there, strata and clusters in step with their rows, rehearsal pairs, all of which can
    be sent to other processes; the same choice from the same pool, whatever came before; the pool as it was; pools of
    one prompt, of equal scores, without categories, of any text, answered or refused with a UserError.

    Args:
        selector: An instance, whose options are taken, or a class whose options all have defaults.
        pool: From which it can choose, with ``num_responses`` responses a prompt; made on the spot by default.

    Raises:
        AssertionError: With the selector's name, what is wrong, and how to mend it.
    """
    subject = Subject(selector, DataSelector)
    count = subject.fresh().num_responses
    with subject.rules("it"):
        check_num_responses(count)
    check = _Check(subject, count, pool or make_pool(num_responses=count))
    check.repeated()
    with seeded(0):
        check.ragged()


class _Check:
    def __init__(self, subject: Subject, count: int, pool: Pool) -> None:
        self.subject, self.count, self.pool, self.fail = subject, count, pool, subject.fail

    def select(self, selector: DataSelector, pool: Pool, what: str, *, ragged: bool = False) -> Selection | None:
        """A checked selection; None where a ragged pool is refused in words."""
        given = _copied(pool)
        where = f"select() on {what}"
        found = self.subject.call(where, lambda: selector.select(given), may_refuse=ragged)
        if found is None and ragged:
            return None
        with self.subject.rules(where):
            found = check_selection(found, len(pool))
        if any(not same(getattr(given, f.name), getattr(pool, f.name)) for f in fields(Pool) if f.name != "embed"):
            self.fail(f"{where} changes the pool", "Copy what you change: the next selector is given the same pool.")
        try:
            pickle.dumps(found)
        except Exception as error:
            self.fail(
                f"{where} returns what cannot be sent to other processes: {error}", "Keep to numbers, texts and arrays."
            )
        return found

    def repeated(self) -> None:
        """The same pool gives the same choice: to a fresh instance, and to one that has chosen before."""
        used = self.subject.fresh()
        with seeded(1):
            first = self.select(used, self.pool, "an ordinary pool")
        with seeded(2):
            second = self.select(self.subject.fresh(), self.pool, "an ordinary pool")
        if not same(_plain(first), _plain(second)):
            self.fail(
                "two instances choose differently from the same pool",
                "Draw from a generator seeded by pool.seed, such as numpy.random.default_rng(pool.seed).",
            )
        self.select(used, replace(self.pool, selection=1), "the pool of a later selection", ragged=True)
        if not same(_plain(self.select(used, self.pool, "an ordinary pool")), _plain(second)):
            self.fail(
                "remembers an earlier selection, which a resumed run would not",
                "Take what comes before from pool.selection.",
            )

    def ragged(self) -> None:
        """Pools that training meets sooner or later."""
        texts, n = list(HOSTILE.values()), self.count
        rows = [text for text in texts for _ in range(n)]
        columns = {name: [values[0]] * len(rows) for name, values in self.pool.columns.items()}
        one = {name: values[:1] for name, values in self.pool.columns.items()}
        eight = {name: [values[0]] * 8 for name, values in self.pool.columns.items()}
        hostile = make_pool(len(texts), n, columns={}, chat=False)
        empty = make_pool(num_responses=n, columns=eight)
        for what, pool in {
            "a pool of one prompt": make_pool(1, n, columns=one),
            "a pool of one response a prompt": make_pool(num_responses=1, columns=eight),
            "a pool without categories": make_pool(num_responses=n, categories=False, columns=eight),
            "a pool of equal scores": make_pool(num_responses=n, scores=[1.0] * 8 * n, columns=eight),
            "a pool of empty responses": replace(empty, response_ids=[[] for _ in empty.response_ids]),
            "hostile texts": replace(hostile, prompts=rows, responses=rows[::-1], columns=columns),
        }.items():
            self.select(self.subject.fresh(), pool, what, ragged=True)


def _copied(pool: Pool) -> Pool:
    values = {f.name: getattr(pool, f.name) for f in fields(Pool)}
    embed = values.pop("embed")
    return Pool(**copy.deepcopy(values), embed=embed)


def _plain(selection: Selection | None) -> Any:
    """What two selections are compared by, whichever sequences hold it."""
    if selection is None:
        return None

    def listed(values: Any) -> Any:
        return (
            values if values is None else [v.item() if isinstance(v, np.generic | torch.Tensor) else v for v in values]
        )

    return [listed(selection.prompts), listed(selection.strata), list(selection.rehearsal), listed(selection.clusters)]
