"""Selects PPO's prompts: those with a learning signal, hard ones more often, in stratified batches."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from trl_rlaif import DataSelector, Pool, Selection, UserError
from trl_rlaif_rehearsal.grouping import ClusterOptions, kinds_of


class PromptOptions(ClusterOptions):
    """Options of ``prompt_selection``."""

    num_responses: int = Field(4, ge=1, description="Responses sampled for each prompt to assess it.")
    min_spread: float | None = Field(
        1e-3,
        ge=0,
        description="Leave out prompts whose scores have at most this standard deviation: all responses score "
        "alike, so there is nothing to learn. null keeps them.",
    )
    hard: float = Field(
        0.0, ge=0, lt=1, description="Fraction of hard prompts among those drawn: the lower half by mean score."
    )
    stratify: Literal["none", "category", "cluster"] = Field(
        "none", description="Balance every batch by the data's categories or by clusters."
    )


class PromptSelection(DataSelector):
    """Drops prompts without a learning signal (like DAPO's dynamic sampling, Yu et al. 2025), repeats hard ones."""

    Options = PromptOptions
    options: PromptOptions

    @property
    def num_responses(self) -> int:
        return self.options.num_responses

    def select(self, pool: Pool) -> Selection:
        options = self.options
        rows, first, place = np.unique(pool.rows.numpy(), return_index=True, return_inverse=True)
        scores = pool.scores.double().numpy()
        counts = np.bincount(place)
        means = np.bincount(place, scores) / counts
        spreads = np.sqrt(np.bincount(place, (scores - means[place]) ** 2) / counts)
        kept = np.arange(len(rows))
        if options.min_spread is not None and options.num_responses > 1:
            kept = np.flatnonzero(spreads > options.min_spread)
        if not len(kept):
            raise UserError(
                f"All {options.num_responses} responses to each of the {len(rows)} prompts score alike: there is "
                "nothing to learn.",
                fix="Raise the temperature, look at the reward, or set prompt_selection's min_spread to null.",
            )
        kept = np.concatenate([kept, _more_of_the_hard(kept, means[kept], options.hard)])
        chosen = first[kept].tolist()
        if options.stratify == "category":
            return Selection(chosen, [pool.categories[i] for i in chosen])
        if options.stratify == "cluster":
            kinds = kinds_of(pool, options)
            labels = kinds.labels.tolist()
            return Selection(chosen, [labels[i] for i in chosen], clusters=labels, embeddings=kinds.directions)
        return Selection(chosen)


def _more_of_the_hard(kept: np.ndarray, means: np.ndarray, share: float) -> np.ndarray:
    """Prompts to repeat, cycling from the hardest, until the harder half makes up the fraction ``share``."""
    hard = kept[np.argsort(means, kind="stable")][: len(kept) // 2]
    # (hard + more) / (all + more) = share
    more = int(np.ceil(max(0.0, (share * len(kept) - len(hard)) / (1 - share)) - 1e-9))
    return np.resize(hard, more) if len(hard) else kept[:0]
