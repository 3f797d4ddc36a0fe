"""The contract of a reward transform, line by line."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from trl_rlaif.components import RewardTransform
from trl_rlaif.testing.checks import Subject, same, seeded
from trl_rlaif.testing.data import HOSTILE, make_preference_scores, make_scored_batch
from trl_rlaif.types import PreferenceScores, ScoredBatch
from trl_rlaif.validation import check_loss, check_scores

_SEED = 0


def check_reward_transform(
    transform: RewardTransform | type[RewardTransform], *, batches: Sequence[ScoredBatch] | None = None
) -> None:
    """Check that a reward transform keeps its contract.

    Finite float32 scores of the same shape, the same in every run under a seed; a state that is its own, can be
    saved, and lets a fresh instance go on exactly where the other one was; a loss that is None, or a finite scalar
    with gradients; inputs as they were; batches of one, of equal scores, without categories, of any text, with
    responses that lack one of the rewards, and without a KL, unless it ``needs_kl``; a whole pool at once.

    Args:
        transform: An instance, whose options are taken, or a class whose options all have defaults.
        batches: At least two that it can transform, with ``parts``; made on the spot by default.

    Raises:
        AssertionError: With the transform's name, what is wrong, and how to mend it.
    """
    subject = Subject(transform, RewardTransform)
    expected = subject.cls.needs_expected
    batches = list(batches) if batches else [make_scored_batch(seed=seed, expected=expected) for seed in range(4)]
    check = _Check(subject, batches)
    with seeded(_SEED):
        check.scores()
        check.repeated()
        check.without_kl()
        check.ragged()
        check.loss()
        check.state()


def raw_scores(batch: ScoredBatch) -> torch.Tensor:
    """(B,) float32, what the transforms begin with: the sum of the rewards that each response has."""
    return sum((part.nan_to_num() for part in batch.parts.values()), torch.zeros(len(batch.prompts)))


class _Check:
    def __init__(self, subject: Subject, batches: list[ScoredBatch]) -> None:
        self.subject, self.batches, self.fail = subject, batches, subject.fail
        self.expected = subject.cls.needs_expected

    def transform(
        self,
        transform: RewardTransform,
        batch: ScoredBatch,
        what: str,
        *,
        ragged: bool = False,
        name: str = "transform",
    ) -> Any:
        """One batch's scores, checked; None where a ragged one is refused in words."""
        scores, given = raw_scores(batch), copy.deepcopy(batch)
        before = scores.clone()
        where = f"{name}() on {what}"
        found = self.subject.call(where, lambda: getattr(transform, name)(scores, given), may_refuse=ragged)
        if found is None and ragged:
            return None
        with self.subject.rules(where):
            check_scores(found, before)
        if not same(scores, before) or not same(given, batch):
            self.fail(f"{where} changes its inputs", "Compute new tensors: the trainer logs the old ones.")
        self.metrics(transform, what)
        return found.detach().clone()

    def metrics(self, transform: RewardTransform, what: str) -> None:
        where = f"metrics() after {what}"
        for name, value in self.subject.call(where, transform.metrics).items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if not isinstance(name, str) or not number:
                self.fail(f"{where} holds {name!r}: {value!r}", "Log finite plain numbers by name.")

    def all(self, transform: RewardTransform) -> list[torch.Tensor]:
        with seeded(_SEED):
            return [self.transform(transform, batch, "an ordinary batch") for batch in self.batches]

    def scores(self) -> None:
        self.all(self.subject.fresh())
        used = self.subject.fresh()
        self.all(used)
        for transform in (self.subject.fresh(), used):
            self.transform(transform, self.batches[-1], "a pool", name="transform_pool")

    def repeated(self) -> None:
        if not same(self.all(self.subject.fresh()), self.all(self.subject.fresh())):
            self.fail(
                "two instances give other scores to the same batches under the same seed",
                "Draw from torch's generator, or one seeded by an option, and share nothing between instances.",
            )

    def without_kl(self) -> None:
        """As RLOO and GRPO hand batches over, unless they are told to compute it."""
        if self.subject.cls.needs_kl:
            return
        batch, found = self.batches[0], []
        for given in (batch, replace(batch, kl=torch.full_like(batch.kl, torch.nan))):
            transform = self.subject.fresh()
            with seeded(_SEED):
                found.append(
                    self.subject.call(
                        "transform() on a batch without a KL",
                        partial(transform.transform, raw_scores(given), copy.deepcopy(given)),
                    )
                )
        if not same(*found):
            self.fail(
                "reads the batch's kl, which RLOO and GRPO do not compute for it",
                "Set needs_kl = True on the class.",
            )

    def ragged(self) -> None:
        """Batches that training meets sooner or later, by a fresh instance each, and behind ordinary ones."""
        texts = list(HOSTILE.values())
        hostile = make_scored_batch(len(texts), expected=self.expected, chat=False)
        equal = {name: torch.ones(6) for name in ("first", "second")}
        new = {"category": ["never seen before", None, "", "a", "b", "a"]}
        one = make_scored_batch(1, expected=self.expected)
        lacking = {"first": torch.tensor([math.nan, 1.0] * 3), "second": torch.tensor([1.0, math.nan, *range(4)])}
        for what, batch in {
            "a batch of one": one,
            "a batch with responses that lack a reward": replace(
                make_scored_batch(expected=self.expected), parts=lacking
            ),
            "a batch without categories": make_scored_batch(expected=self.expected, categories=False),
            "a batch of new and missing categories": replace(make_scored_batch(expected=self.expected), columns=new),
            "a batch of equal scores": replace(make_scored_batch(expected=self.expected), parts=equal),
            "a batch of huge scores": replace(one, parts={"first": torch.tensor([1e6]), "second": torch.zeros(1)}),
            "an empty response": replace(one, lengths=torch.tensor([0])),
            "hostile texts": replace(hostile, prompts=texts, completions=texts[::-1]),
        }.items():
            self.transform(self.subject.fresh(), batch, what, ragged=True)
            used = self.subject.fresh()
            self.all(used)
            self.transform(used, batch, f"{what} behind ordinary ones", ragged=True)

    # ---- The loss ---------------------------------------------------------------------------------------

    def loss(self) -> None:
        if self._loss(self.subject.fresh(), make_preference_scores(expected=self.expected), "comparisons") is None:
            return
        sure = make_preference_scores(expected=self.expected)
        for what, scores in {
            "comparisons with other policies": make_preference_scores(expected=self.expected, policies=2),
            "a single comparison": make_preference_scores(1, expected=self.expected),
            "comparisons without categories": make_preference_scores(expected=self.expected, categories=False),
            "comparisons whose labels are sure": replace(sure, p=torch.tensor([0.0, 1.0] * 3)),
            "scores far apart": replace(sure, chosen=(sure.chosen.detach() * 1e3).requires_grad_()),
        }.items():
            self._loss(self.subject.fresh(), scores, what)

    def _loss(self, transform: RewardTransform, scores: PreferenceScores, what: str) -> torch.Tensor | None:
        where, before = f"loss() on {what}", _values(scores)
        loss = self.subject.call(where, lambda: transform.loss(scores))
        if loss is None:
            return None
        with self.subject.rules(where):
            check_loss(loss)
        if not same(_values(scores), before):
            self.fail(f"{where} changes its inputs", "Compute new tensors.")
        learned = [scores.chosen, scores.rejected]
        gradients = torch.autograd.grad(loss, learned, allow_unused=True) if loss.requires_grad else [None]
        if any(g is None or not g.isfinite().all() for g in gradients):
            self.fail(
                f"{where} gives the scores no finite gradient",
                "Compute it from scores.chosen and scores.rejected, without detach() or a logarithm of 0.",
            )
        return loss.detach()

    # ---- The state --------------------------------------------------------------------------------------

    def state(self) -> None:
        """A checkpoint holds what it needs, and nothing else reaches into it."""
        original = self._used()
        state = self.subject.call("state_dict()", original.state_dict)
        if not isinstance(state, dict):
            self.fail(f"state_dict() returns a {type(state).__name__}", "Return a dict.")
        kept = copy.deepcopy(state)
        saved = self._saved(state)
        ahead = self._ahead(original)
        if not same(state, kept):
            self.fail(
                "what state_dict() returned changes as training goes on",
                "Return copies: the trainer goes back to it after it has scored a pool of responses.",
            )
        heir = self.subject.fresh()
        self._load(heir, saved)
        if not same(self._ahead(heir), ahead):
            self.fail(
                "a fresh instance with its state gives other results",
                "Put everything that it remembers into state_dict(), and take it over in load_state_dict().",
            )
        self._load(original, state)
        if not same(self._ahead(original), ahead):
            self.fail(
                "loading a state does not take it back to it", "Replace in load_state_dict() all that it remembers."
            )
        if not same(state, kept):
            self.fail("goes on in the state that was loaded", "Copy the values in load_state_dict().")

    def _load(self, transform: RewardTransform, state: dict[str, Any]) -> None:
        self.subject.call("load_state_dict() of what state_dict() gave", lambda: transform.load_state_dict(state))

    def _used(self) -> RewardTransform:
        """An instance that has been trained with and has transformed all batches but the last."""
        transform = self.subject.fresh()
        with seeded(_SEED):
            for seed in range(3):
                self._loss(transform, make_preference_scores(seed=seed, expected=self.expected), "comparisons")
            for batch in self.batches[:-1]:
                self.transform(transform, batch, "an ordinary batch")
        return transform

    def _ahead(self, transform: RewardTransform) -> list[Any]:
        """What it gives next."""
        with seeded(_SEED):
            comparisons = make_preference_scores(seed=9, expected=self.expected)
            found = [self._loss(transform, comparisons, "comparisons") for _ in range(2)]
            found += [self.transform(transform, batch, "an ordinary batch") for batch in self.batches[-2:]]
        return [*found, dict(transform.metrics())]

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state as a checkpoint gives it back."""
        file = io.BytesIO()
        try:
            torch.save(state, file)
            file.seek(0)
            return torch.load(file, weights_only=True)
        except Exception as error:
            self.fail(
                f"its state cannot be saved and loaded: {error}",
                "Keep tensors, numbers, texts, lists and dicts in state_dict(), no objects of your own.",
            )


def _values(scores: PreferenceScores) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in vars(scores).items()}
