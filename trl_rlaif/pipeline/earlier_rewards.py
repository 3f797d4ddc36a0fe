"""What reward training reuses from earlier rounds: the adapter, a fraction of the pairs, and the held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_rlaif.data.overlap import split_by_group
from trl_rlaif.evaluation import is_even, pairwise_accuracy
from trl_rlaif.files import read_lines
from trl_rlaif.pipeline import artifacts
from trl_rlaif.progress import progress_bar
from trl_rlaif.reward.heads import widen
from trl_rlaif.reward.scoring import score_pairs
from trl_rlaif.states import load_state

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.run_folder import RunFolder


def starting_adapter(context: Context) -> Path | None:
    """The latest reward model of the earlier runs, from which training continues; None if there is none."""
    return next((run / artifacts.REWARD for run in context.previous if run.is_complete("reward")), None)


def resumed(model: Any, transforms: Sequence[Any], names: Sequence[str], adapter: Path) -> Any:
    """A trainable classifier with the adapter and head of an earlier round; loads the transforms' states.

    Args:
        model: The classifier without adapters.
        transforms: The recipe's transforms, with ``names`` in the same order.
        adapter: A folder written by the stage reward.
    """
    from peft import PeftModel

    if any(transform.needs_expected for transform in transforms):
        widen(model.score)  # as in the saved head; the trainer expects a model with one label and widens it to two
    for name, transform in zip(names, transforms, strict=True):
        state = adapter / artifacts.transform_of(name)
        if state.exists():
            transform.load_state_dict(load_state(state))
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def split(context: Context, prompts: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Indices of training and held-out rows. Prompts held out in an earlier round are held out again.

    Otherwise the reward model could be evaluated on prompts that it was trained on in an earlier round.

    Args:
        prompts: The ``prompt_key`` of each row.
        share: Fraction of rows to hold out if no earlier round held out any of these prompts, or held out all.
    """
    known = _held_out(context.previous)
    held_out = [i for i, key in enumerate(prompts) if key in known]
    training = [i for i, key in enumerate(prompts) if key not in known]
    return (training, held_out) if training and held_out else split_by_group(prompts, share, context.recipe.run.seed)


def _held_out(runs: Sequence[RunFolder]) -> set[str]:
    rows = [row for run in runs for row in read_lines(run / artifacts.REWARD_SCORES)]
    return {row["prompt_key"] for row in rows if "prompt_key" in row}


def with_earlier_pairs(
    context: Context, train: Dataset, held_out: Dataset, tokenized: Callable[[Path], Dataset]
) -> tuple[Dataset, int]:
    """This round's training pairs with a random fraction of earlier rounds' pairs, and the number of the latter.

    Args:
        train, held_out: This round's pairs; earlier pairs of held-out prompts, of any round, are left out.
        tokenized: Returns the pairs of a folder ``preferences/``, tokenized like this round's.
    """
    from datasets import concatenate_datasets

    folders = [run / artifacts.PREFERENCES for run in context.previous]
    without = set(held_out["prompt_key"]) | _held_out(context.previous)
    columns = train.column_names
    found = [tokenized(folder) for folder in folders if folder.is_dir()]
    found = [part.select_columns([name for name in columns if name in part.column_names]) for part in found]
    kept = [part.select([i for i, key in enumerate(part["prompt_key"]) if key not in without]) for part in found]
    if not kept:
        return train, 0
    earlier = concatenate_datasets(kept)
    count = round(context.recipe.rounds.earlier * len(earlier))
    drawn = sorted(random.Random(context.recipe.run.seed).sample(range(len(earlier)), count))
    return concatenate_datasets([train, earlier.select(drawn)]), count


def accuracy_before(trainer: Any, train: Dataset, held_out: Dataset) -> dict[str, dict[str, Any] | None]:
    """Accuracy of an earlier round's reward model on this round's pairs, which the current policy wrote.

    Returns:
        ``pairwise_accuracy`` against the labels, without ties (None if no pair is left), for ``all`` pairs, which it
        was not trained on, and for the ``held_out`` ones, whose prompts it was not trained on either.
    """
    size, parts = trainer.args.per_device_eval_batch_size, [part for part in (train, held_out) if len(part)]
    scored = []
    bar = progress_bar("Scoring the new pairs", len(train) + len(held_out), unit="pairs")
    with bar as advance, trainer.accelerator.autocast():  # as for the trained model
        for part in parts:
            scored.append(score_pairs(trainer.model, part, trainer.data_collator, size, trainer.batch_tokens)[:2])
            advance(len(part))
    rows = [
        (c, r, key, part is held_out)
        for part, (chosen, rejected) in zip(parts, scored, strict=True)
        for c, r, key, p in zip(chosen.tolist(), rejected.tolist(), part["prompt_key"], part["p"], strict=True)
        if not is_even(p)
    ]
    return {name: _accuracy([row[:3] for row in rows if row[3] or name == "all"]) for name in ("all", "held_out")}


def _accuracy(rows: Sequence[tuple[float, float, str]]) -> dict[str, Any] | None:
    if not rows:
        return None
    chosen, rejected, prompts = zip(*rows, strict=True)
    return pairwise_accuracy(chosen, rejected, clusters=prompts)
