"""Which prompts PPO trains on: the selectors' choice from a pool, one for all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object

from trl_rlaif.components import DataSelector
from trl_rlaif.errors import UserError
from trl_rlaif.events import Pool
from trl_rlaif.ppo.processes import failing_together

if TYPE_CHECKING:
    from trl_rlaif.ppo.trainer import PPOTrainer


def chosen_rows(trainer: PPOTrainer) -> list[int]:
    """The selectors' choice from the trainer's prompts, each with one scored response of the present policy.

    Every process draws and scores a share of the pool; the first one chooses from all of it.

    Raises:
        UserError: As ``select_rows``.
    """
    accelerator, rows = trainer.accelerator, []
    pool = _pool(trainer)
    with failing_together(accelerator):
        if accelerator.is_main_process:
            rows = select_rows(trainer.data_selectors, pool)
    return broadcast_object_list([rows])[0]


def _pool(trainer: PPOTrainer) -> Pool:
    processes, total = trainer.accelerator.num_processes, len(trainer.train_dataset)
    share = -(-total // processes)
    begin = trainer.accelerator.process_index * share
    size = trainer.args.local_batch_size
    parts = []
    for start in range(begin, begin + share, size):
        # What is beyond the last prompt is a repetition, so that all processes draw equally many.
        rows = [i % total for i in range(start, min(start + size, begin + share))]
        rollout = trainer.sample(trainer.data_collator([trainer.train_dataset[i] for i in rows]))
        scores = trainer.transform(trainer.score(rollout), rollout).cpu()
        parts.append(Pool(rollout.prompts, rollout.completions, scores, rollout.categories))
    parts = gather_object(parts)
    return Pool(
        [prompt for part in parts for prompt in part.prompts][:total],
        [response for part in parts for response in part.responses][:total],
        torch.cat([part.scores for part in parts])[:total],
        [category for part in parts for category in part.categories][:total],
    )


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
