"""Responses to the prompts of ``eval_dataset``, to read while the policy trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from trl_rlaif.report.formatting import clean
from trl_rlaif.rl.scoring import Scores

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.trainer import PPOTrainer

_COLUMNS = ("prompt", "completion", "score")
_SHOWN = 5


def due(trainer: PPOTrainer) -> bool:
    """Whether the update that has just ended is one of the ``num_sample_generations``."""
    args, step = trainer.args, trainer.state.global_step
    if trainer.eval_dataset is None or args.num_sample_generations < 1:
        return False
    return (step - 1) % max(1, args.num_total_batches // args.num_sample_generations) == 0


def show(trainer: PPOTrainer, *, first_batch: bool) -> list[tuple[str, str, float]]:
    """Print near-greedy responses and their raw scores, and log them where W&B or Comet is running.

    Args:
        first_batch: Of the prompts only the first ``per_device_eval_batch_size``, and print few of them.

    Returns:
        Prompt, completion and score of every prompt, over all processes; NaN where no reward scores a completion.
    """
    rows = _sampled(trainer, first_batch=first_batch)
    if trainer.accelerator.is_main_process:
        _print(rows[:_SHOWN] if first_batch else rows, trainer.state.global_step)
        _log(trainer.args.report_to, rows)
    return rows


def _sampled(trainer: PPOTrainer, *, first_batch: bool) -> list[tuple[str, str, float]]:
    accelerator, args, sampler = trainer.accelerator, trainer.args, trainer.generator
    total = len(trainer.eval_dataset)
    # As many to each process, since they meet at every batch: the last begin again at the front, and are cut off below.
    share = -(-total // accelerator.num_processes)
    first = accelerator.process_index * share
    own = trainer.eval_dataset.select([row % total for row in range(first, first + share)])
    # Not the parent's loader: it drops a last batch that is not full, so that of a small set nothing would be seen.
    loader = DataLoader(own, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    found: list[tuple[str, str, float]] = []
    before, sampler.temperature = sampler.temperature, 0.01 + 1e-7  # the parent's
    state = trainer.rewards.state_dict()
    try:
        for batch in loader:
            rollout = trainer.sample(batch)
            texts = map(_text, rollout.prompts), map(_text, rollout.completions)
            found += zip(*texts, Scores.of(trainer.score(rollout)).total.tolist(), strict=True)
            if first_batch:
                break
    finally:
        sampler.temperature = before
        trainer.rewards.load_state_dict(state)
    return gather_object(found)[:total]


def _text(value: Any) -> str:
    """Of a prompt or completion, as text or as messages."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def _print(rows: list[tuple[str, str, float]], step: int) -> None:
    table = Table(*_COLUMNS, title=f"Update {step}", show_lines=True)
    for prompt, completion, score in rows:
        # Square brackets of a response are no markup, and what would steer the terminal is not let through.
        table.add_row(Text(clean(prompt)), Text(clean(completion)), "none" if math.isnan(score) else f"{score:.3f}")
    Console().print(table)


def _log(report_to: list[str], rows: list[tuple[str, str, float]]) -> None:
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(columns=list(_COLUMNS), data=[list(row) for row in rows])})
    if "comet_ml" in report_to:
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.log_table("completions.csv", [list(row) for row in rows], headers=list(_COLUMNS))
