"""Pairs to probabilities by reading a judge's distribution over "1" and "2" in both orders."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from pydantic import Field

from trl_rlaif import Judge, Label, Labeler, Options, Pair
from trl_rlaif_distilled.debias import Debias, combine, preference


class DistilledOptions(Options):
    """Options of `distilled`."""

    debias: Debias = Field(
        "mean_logit",
        description="How the two orders become one: mean_prob (the paper's) or mean_logit, which "
        "cancels a position bias without losing confidence.",
    )


class DistilledLabeler(Labeler):
    """Soft labels from token probabilities (Lee et al. 2023, section 2.1)."""

    Options = DistilledOptions

    def label(self, pairs: Sequence[Pair], judge: Judge, done: Collection[str] = ()) -> Iterator[Label]:
        """Yield one label a pair; both orders of a pair stand in one forward pass.

        The batches follow from all pairs, also those in ``done``, so that a resumed run computes the
        same numbers as an undisturbed one.
        """
        done = set(done)
        fitting, questions = [], []
        for pair in pairs:
            both = (
                judge.encode(pair.prompt, pair.response_1, pair.response_2),
                judge.encode(pair.prompt, pair.response_2, pair.response_1),
            )
            if all(map(judge.fits, both)):
                fitting.append(pair)
                questions.append(both)
            elif pair.id not in done:
                yield Label(pair.id, judge=judge.name, skipped="longer than the judge's context")

        lengths = [2 * max(map(len, both)) for both in questions]
        for batch in judge.batches(lengths):
            if all(fitting[i].id in done for i in batch):
                continue
            logprobs = judge.logprobs([q for i in batch for q in questions[i]]).view(-1, 2, 2).tolist()
            for i, (first, second) in zip(batch, logprobs, strict=True):
                if fitting[i].id not in done:
                    yield self._label(fitting[i].id, first, second, judge.name)

    def _label(self, id: str, order_12: list[float], order_21: list[float], judge: str) -> Label:
        if not all(map(math.isfinite, order_12 + order_21)):
            return Label(id, judge=judge, skipped="the judge's probabilities are not finite")
        p_12, mass_12 = preference(order_12[0], order_12[1])
        # Shown second, response_1 is the candidate "2".
        p_21, mass_21 = preference(order_21[1], order_21[0])
        p = combine(order_12[0] - order_12[1], order_21[1] - order_21[0], self.options.debias)
        return Label(id, p=p, p_12=p_12, p_21=p_21, mass_12=mass_12, mass_21=mass_21, judge=judge)
