"""The contract of a data selector, line by line."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from trl_rlaif.components import DataSelector
from trl_rlaif.events import Pool, RehearsalPair, Selection
from trl_rlaif.testing.checks import Subject, same, seeded
from trl_rlaif.testing.data import HOSTILE, make_pool


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
    if type(count) is not int or count < 1:
        subject.fail(f"num_responses is {count!r}", "Make it a whole number, 1 or more.")
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
        if not isinstance(found, Selection):
            if isinstance(found, str | bytes) or not isinstance(found, Iterable):
                self.fail(f"{where} returns a {type(found).__name__}", "Return a Selection, or indices of the pool.")
            found = Selection(prompts=list(found))
        self._check_prompts(found, len(pool), where)
        self._check_rehearsal(found.rehearsal, where)
        self._check_clusters(found, len(pool), where)
        if any(not same(getattr(given, f.name), getattr(pool, f.name)) for f in fields(Pool) if f.name != "embed"):
            self.fail(f"{where} changes the pool", "Copy what you change: the next selector is given the same pool.")
        try:
            pickle.dumps(found)
        except Exception as error:
            self.fail(
                f"{where} returns what cannot be sent to other processes: {error}", "Keep to numbers, texts and arrays."
            )
        return found

    def _check_prompts(self, found: Selection, size: int, where: str) -> None:
        if found.prompts is None:
            if found.strata is not None:
                self.fail(f"{where} returns strata without prompts", "Give each of prompts its label.")
            return
        for index in found.prompts:
            if isinstance(index, bool | np.bool_):
                self.fail(f"{where} returns a mask", "Return indices, such as numpy.flatnonzero(mask).")
            try:
                whole = operator.index(index)
            except TypeError:
                self.fail(f"{where} returns {index!r}, which is no index", "Return whole numbers.")
            if not 0 <= whole < size:
                self.fail(
                    f"{where} returns the index {whole} of a pool of {size}",
                    "Return places in the pool, counted from 0, not rows of the dataset.",
                )
        if not len(found.prompts):
            self.fail(
                f"{where} leaves no prompt to train on",
                "Choose at least one, raise a UserError that says what to change, or return Selection(prompts=None).",
            )
        if found.strata is None:
            return
        if len(found.strata) != len(found.prompts) or not all(isinstance(label, Hashable) for label in found.strata):
            self.fail(f"{where} returns strata that do not belong to its prompts", "Give each of prompts one label.")

    def _check_rehearsal(self, pairs: Sequence[Any], where: str) -> None:
        for pair in pairs:
            if not isinstance(pair, RehearsalPair):
                self.fail(f"{where} rehearses a {type(pair).__name__}", "Make pairs with pool.pair(index, why='...').")
            if not pair.prompt_ids or not pair.response_ids:
                self.fail(f"{where} rehearses an empty prompt or response", "Leave out rows without response_ids.")
            if pair.score is not None and not math.isfinite(pair.score):
                self.fail(f"{where} rehearses a pair whose score is {pair.score}", "Leave it out.")

    def _check_clusters(self, found: Selection, size: int, where: str) -> None:
        if found.clusters is not None and len(found.clusters) != size:
            self.fail(f"{where} returns {len(found.clusters)} clusters for {size} rows", "Give every row its cluster.")
        if found.embeddings is not None:
            shape = np.shape(found.embeddings)
            if len(shape) != 2 or shape[0] != size or not np.isfinite(found.embeddings).all():
                self.fail(f"{where} returns embeddings of the shape {shape}", f"Give a finite ({size}, H) array.")

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
