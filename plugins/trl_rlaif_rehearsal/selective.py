"""Selective Rehearsal (Peng et al. 2023): the best responses for every cluster of prompts."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from trl_rlaif import DataSelector, Pool, RehearsalPair, Selection
from trl_rlaif_rehearsal.criteria import CRITERIA, worth
from trl_rlaif_rehearsal.grouping import ClusterOptions, kinds_of

Criterion = Literal["advantage", "entropy", "length", "human", "random"]


class RehearsalOptions(ClusterOptions):
    """Options of ``selective_rehearsal``."""

    per_cluster: int = Field(16, ge=1, description="Number of best pairs to keep per cluster.")
    criterion: Criterion | dict[Criterion, float] = Field(
        "advantage", description=f"Criterion for the best pairs: {', '.join(CRITERIA)}, or weights by name."
    )
    num_responses: int = Field(1, ge=1, description="Responses of the initial policy per prompt to choose from.")
    duplicates: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Cosine similarity above which prompts count as duplicates; the best pair is kept.",
    )

    @field_validator("clusters")
    @classmethod
    def _some(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("Write a number of clusters, 1 or more, or auto.")
        return value

    @field_validator("criterion")
    @classmethod
    def _weighted(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict) and not any(value.values()):
            raise ValueError("Give at least one criterion a weight.")
        return value


class SelectiveRehearsal(DataSelector):
    """Clusters the prompts and rehearses the best pairs of every cluster; PPO's prompts are unchanged."""

    Options = RehearsalOptions
    options: RehearsalOptions

    @property
    def num_responses(self) -> int:
        return self.options.num_responses

    def select(self, pool: Pool) -> Selection:
        kinds = kinds_of(pool, self.options)
        values = worth(pool, self.options.criterion)
        pairs: list[RehearsalPair] = []
        for label in range(kinds.labels.max() + 1):
            members = np.flatnonzero(kinds.labels == label)
            pairs += self._best(pool, label, members[np.argsort(-values[members], kind="stable")], kinds.directions)
        return Selection(rehearsal=pairs, clusters=kinds.labels.tolist(), embeddings=kinds.directions)

    def _best(self, pool: Pool, label: int, ranked: np.ndarray, directions: np.ndarray) -> list[RehearsalPair]:
        """The best rows of a cluster: no near-duplicates, no repeated prompts, no empty responses."""
        kept: list[int] = []
        pairs = []
        for rank, i in enumerate(ranked.tolist(), 1):
            if len(kept) == self.options.per_cluster:
                break
            near = kept and (directions[kept] @ directions[i]).max() > self.options.duplicates
            same = any(pool.rows[i] == pool.rows[j] for j in kept)
            if near or same or not pool.response_ids[i]:
                continue
            kept.append(i)
            why = f"{self._criterion()}: {rank} of {len(ranked)} in cluster {label + 1}"
            pairs.append(pool.pair(i, why=why, cluster=label))
        return pairs

    def _criterion(self) -> str:
        criterion = self.options.criterion
        if isinstance(criterion, str):
            return criterion
        return " + ".join(f"{weight:g} {name}" for name, weight in criterion.items())
