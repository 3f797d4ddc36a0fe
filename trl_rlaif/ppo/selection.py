"""Which prompts PPO trains on: the selectors' choice from a pool."""

from __future__ import annotations

from collections.abc import Sequence

from trl_rlaif.components import DataSelector
from trl_rlaif.errors import UserError
from trl_rlaif.events import Pool


def select_rows(selectors: Sequence[DataSelector], pool: Pool) -> list[int]:
    """Apply selectors one after the other, each to what the one before left.

    Returns:
        Indices into the pool that was given.

    Raises:
        UserError: A selector chose nothing, or an index that is not there.
    """
    kept = list(range(len(pool.prompts)))
    for selector in selectors:
        chosen = [int(i) for i in selector.select(pool)]
        if not chosen or not all(0 <= i < len(kept) for i in chosen):
            raise UserError(
                f"The data selector {type(selector).__name__} chose {len(chosen)} rows of {len(kept)}"
                + (", one of which is not there." if chosen else "."),
                fix="It must return at least one index of the pool, counted from 0.",
            )
        kept = [kept[i] for i in chosen]
        pool = Pool(
            [pool.prompts[i] for i in chosen],
            [pool.responses[i] for i in chosen],
            pool.scores[chosen],
            [pool.categories[i] for i in chosen],
        )
    return kept
