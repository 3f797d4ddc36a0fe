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
    """Near-greedy responses of the present policy to some prompts, with their raw scores.

    Args:
        prompts: With ``input_ids``.
        collate: Makes a batch of rows.
        steps: Sample and score.
        generator: Draws near-greedily meanwhile.
        rewards: Whose state is afterwards what it was.
        args: How often, in which batches, and which trackers are told.
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
        """Whether the update that has just ended is one of the ``num_sample_generations``."""
        often = self.args.num_sample_generations
        return often > 0 and (update - 1) % max(1, self.args.num_total_batches // often) == 0

    def show(self, update: int, *, first_batch: bool) -> list[Row]:
        """Print the responses, and log them where W&B or Comet is running.

        Args:
            update: For the heading.
            first_batch: Of the prompts only the first ``per_device_eval_batch_size``, and print few of them.

        Returns:
            Prompt, completion and score of every prompt, over all processes; NaN where no reward scores a completion.
        """
        rows = self._sampled(first_batch=first_batch)
        if self.accelerator.is_main_process:
            _print(rows[:_SHOWN] if first_batch else rows, update)
            _log(self.args.report_to, rows)
        return rows

    def _sampled(self, *, first_batch: bool) -> list[Row]:
        total = len(self.prompts)
        # As many to each process, since they meet at every batch: the last begin again at the front, and are cut off.
        share = -(-total // self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        own = self.prompts.select([row % total for row in range(first, first + share)])
        # Not TRL's loader: it drops a last batch that is not full, so that of a small set nothing would be seen.
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
    """Of a prompt or completion, as text or as messages."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def _print(rows: list[Row], step: int) -> None:
    table = Table(*_COLUMNS, title=f"Update {step}", show_lines=True)
    for prompt, completion, score in rows:
        # Square brackets of a response are no markup, and what would steer the terminal is not let through.
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
