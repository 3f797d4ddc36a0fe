"""Rejection sampling: the best response to each prompt (RAFT), or all above a threshold (ReST)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from trl_rlaif import DataSelector, Options, Pool, RehearsalPair, Selection

_T = TypeVar("_T")
_Score = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class RejectionOptions(Options):
    """Options of ``rejection_sampling``."""

    num_responses: int = Field(4, ge=1, description="Responses sampled for each prompt.")
    keep: Literal["best", "above"] = Field(
        "best",
        description="best: the best response to each prompt (RAFT); above: all above the threshold (ReST).",
    )
    threshold: _Score | list[_Score] | None = Field(
        None, description="Minimum score to accept; a list has an increasing value for each selection."
    )
    quantile: _Share | list[_Share] | None = Field(
        None,
        description="Minimum quantile of the pool's scores, 0 to 1; a list has an increasing value for each selection.",
    )

    @field_validator("threshold", "quantile")
    @classmethod
    def _rising(cls, value: float | list[float] | None) -> float | list[float] | None:
        if isinstance(value, list) and not value:
            raise ValueError("Write at least one number, or null.")
        if isinstance(value, list) and any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError("Write increasing numbers; the last one is kept for later selections.")
        return value

    @model_validator(mode="after")
    def _bounded(self) -> RejectionOptions:
        if self.keep == "above" and self.threshold is None and self.quantile is None:
            raise ValueError("keep: above needs a threshold or a quantile; otherwise everything is accepted.")
        return self


class RejectionSampling(DataSelector):
    """Accepts responses by their scores (RAFT, Dong et al. 2023; ReST, Gulcehre et al. 2023).

    With ``rl.algorithm: rejection_sampling``, the policy is fine-tuned on them; with PPO, it also rehearses them. A
    score equal to the threshold is accepted. With both a threshold and a quantile, a score must reach both.
    """

    Options = RejectionOptions
    options: RejectionOptions

    @property
    def num_responses(self) -> int:
        return self.options.num_responses

    def select(self, pool: Pool) -> Selection:
        bounds = self._bounds(pool)
        known: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        pairs: list[RehearsalPair] = []
        for i, why in self._candidates(pool):
            score = pool.scores[i].item()
            same = tuple(pool.prompt_ids[i]), tuple(pool.response_ids[i])
            if not pool.response_ids[i] or same in known or any(score < bound for bound, _ in bounds):
                continue
            known.add(same)
            reasons = [why, *(f"at least {name}" for _, name in bounds)]
            pairs.append(pool.pair(i, why=f"score {score:.4g}, {', '.join(reason for reason in reasons if reason)}"))
        return Selection(rehearsal=pairs)

    def _bounds(self, pool: Pool) -> list[tuple[float, str]]:
        """Minimum scores in this selection, with their descriptions."""
        bounds: list[tuple[float, str]] = []
        if self.options.threshold is not None:
            # Rounded to float32 like the scores, or 0.7 would be rejected at a threshold of 0.7.
            value = float(np.float32(_at(self.options.threshold, pool.selection)))
            bounds.append((value, f"the threshold {value:.4g}"))
        if self.options.quantile is not None:
            share = _at(self.options.quantile, pool.selection)
            # An actual score: an interpolated value could be rounded above the best.
            value = float(np.quantile(pool.scores.double().numpy(), share, method="higher"))
            bounds.append((value, f"{value:.4g}, the {share:g} quantile of {len(pool)} scores"))
        return bounds

    def _candidates(self, pool: Pool) -> list[tuple[int, str]]:
        """Candidate rows in the pool's order (best of N: by prompt), each with the reason for its selection."""
        if self.options.keep == "above":
            return [(i, "") for i in range(len(pool))]
        of_prompt: dict[int, list[int]] = {}
        for i, row in enumerate(pool.rows.tolist()):
            of_prompt.setdefault(row, []).append(i)
        best = [
            (max(rows, key=lambda i: (bool(pool.response_ids[i]), pool.scores[i].item())), len(rows))
            for rows in of_prompt.values()
        ]
        return [(i, f"the best of {count} to its prompt") for i, count in best]


def _at(values: _T | list[_T], selection: int) -> _T:
    """The value for a selection, counted from 0; the last one is kept."""
    return values[min(selection, len(values) - 1)] if isinstance(values, list) else values
