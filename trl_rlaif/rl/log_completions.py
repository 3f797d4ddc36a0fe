"""Responses to the prompts of ``eval_dataset``, to read while the policy trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from trl_rlaif.report.formatting import clean
from trl_rlaif.rl.scoring import RewardPipeline, Scores

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from trl_rlaif.rl.generation import RolloutGenerator
    from trl_rlaif.rl.ppo.config import PPOConfig
    from trl_rlaif.rl.selection import Steps

_COLUMNS = ("prompt", "completion", "score")
_SHOWN = 5

Row = tuple[str, str, float]


@dataclass
class CompletionLog:
    """Near-greedy responses of the current policy to some prompts, with their raw scores.

    Args:
        prompts: With ``input_ids``.
        collate: Makes a batch from rows.
        steps: Sample and score.
        generator: Samples at a near-zero temperature meanwhile.
        rewards: Their state is restored afterwards.
        args: How often, in which batches, and to which trackers.
        accelerator: Of all processes.
    """

    prompts: Dataset
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    steps: Steps
    generator: RolloutGenerator
    rewards: RewardPipeline
    args: PPOConfig
    accelerator: Accelerator

    def due(self, update: int) -> bool:
        """Whether completions are due after this update, one of ``num_sample_generations``."""
        often = self.args.num_sample_generations
        return often > 0 and (update - 1) % max(1, self.args.num_total_batches // often) == 0

    def show(self, update: int, *, first_batch: bool) -> list[Row]:
        """Print the responses, and log them to W&B or Comet if one is running.

        Args:
            update: For the heading.
            first_batch: Use only the first ``per_device_eval_batch_size`` prompts, and print few of them.

        Returns:
            Prompt, completion and score of every prompt, over all processes; NaN if no reward scores a completion.
        """
        rows = self._sampled(first_batch=first_batch)
        if self.accelerator.is_main_process:
            _print(rows[:_SHOWN] if first_batch else rows, update)
            _log(self.args.report_to, rows)
        return rows

    def _sampled(self, *, first_batch: bool) -> list[Row]:
        total = len(self.prompts)
        # Equally many per process, since they synchronize at every batch: the last wrap around, and are cut off.
        share = -(-total // self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        own = self.prompts.select([row % total for row in range(first, first + share)])
        # Not TRL's loader: it drops an incomplete last batch, which may be all of a small set.
        loader = DataLoader(own, self.args.per_device_eval_batch_size, collate_fn=self.collate)
        found: list[Row] = []
        before, self.generator.temperature = self.generator.temperature, 0.01 + 1e-7  # as in TRL
        try:
            with self.rewards.unchanged():
                for batch in loader:
                    rollout = self.steps.sample(batch)
                    texts = map(_text, rollout.prompts), map(_text, rollout.completions)
                    found += zip(*texts, Scores.of(self.steps.score(rollout)).total.tolist(), strict=True)
                    if first_batch:
                        break
        finally:
            self.generator.temperature = before
        return gather_object(found)[:total]


def _text(value: Any) -> str:
    """The text of a prompt or completion, given as text or as messages."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def _print(rows: list[Row], step: int) -> None:
    table = Table(*_COLUMNS, title=f"Update {step}", show_lines=True)
    for prompt, completion, score in rows:
        # Square brackets in a response are not markup, and control sequences do not reach the terminal.
        table.add_row(Text(clean(prompt)), Text(clean(completion)), "none" if math.isnan(score) else f"{score:.3f}")
    Console().print(table)


def _log(report_to: list[str], rows: list[Row]) -> None:
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(columns=list(_COLUMNS), data=[list(row) for row in rows])})
    if "comet_ml" in report_to:
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.log_table("completions.csv", [list(row) for row in rows], headers=list(_COLUMNS))
