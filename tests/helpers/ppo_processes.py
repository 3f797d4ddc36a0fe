"""PPO behavior that only several processes show. Run as a script (tests/ on PYTHONPATH), this is one of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from helpers import ppo_task
from helpers.ppo import numbers
from helpers.processes import write_result
from trl_rlaif.components import DataSelector, RewardTransform
from trl_rlaif.models import forward
from trl_rlaif.types import Selection


class RunningMean(RewardTransform):
    """Scores minus the mean of all that this process saw, which differs between processes."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def transform(self, scores: torch.Tensor, batch: Any) -> torch.Tensor:
        self.total, self.count = self.total + scores.sum().item(), self.count + len(scores)
        return scores - self.total / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


class AnyEight(DataSelector):
    """Eight random rows in two strata, different ones in each process that is asked, and every pair for rehearsal."""

    def __init__(self) -> None:
        self.pool: Any = None

    def select(self, pool: Any) -> Selection:
        self.pool = pool
        rows = random.Random(PartialState().process_index).sample(range(len(pool)), 8)
        return Selection(rows, [i >= 4 for i in range(8)], [pool.pair(i, why="all") for i in range(len(pool))])


def _trainer(folder: Path, *, prompts: int, updates: int, **options: Any) -> Any:
    """Eight prompts per update in two processes, in two minibatches of two micro-batches per process."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_mini_batches": 2}
    settings |= {"total_episodes": updates * 8, "num_ppo_epochs": 2, "learning_rate": 1e-2}
    settings |= {"lr_scheduler_type": "linear", "kl_coef": 0.05}
    trainer = ppo_task.make_trainer(folder, prompts=prompts, **settings, **options)
    trainer.drawn = []
    sample = trainer.sample
    trainer.sample = lambda batch: (trainer.drawn.append(list(batch["prompt"])), sample(batch))[1]
    return trainer


def _seen(trainer: Any) -> dict[str, Any]:
    return {"metrics": numbers(trainer), "prompts": trainer.drawn, "parameters": ppo_task.trainable(trainer)}


def resumed(folder: Path) -> dict[str, Any]:
    """Five uninterrupted updates, and the last three again from a checkpoint in the middle of an epoch."""
    seen = {}
    for name in ("whole", "resumed"):
        options = {"save_strategy": "steps", "save_steps": 2} if name == "whole" else {}
        trainer = _trainer(folder / name, prompts=24, updates=5, **options)
        trainer.rewards.transforms = [RunningMean()]
        if name == "resumed":
            torch.manual_seed(99)
        trainer.train(resume_from_checkpoint=None if name == "whole" else folder / "whole" / "checkpoint-2")
        seen[name] = _seen(trainer)
    return seen


def selected(folder: Path) -> dict[str, Any]:
    """Two updates after selecting from nine prompts, which two processes cannot share evenly."""
    trainer = _trainer(folder, prompts=9, updates=2)
    selector = AnyEight()
    trainer.selection.selectors = [selector]
    trainer.train()
    pool = selector.pool
    return {
        "rows": trainer.selection.chosen.rows,
        "pairs": [pair.response for pair in trainer.rehearsal.pairs],
        "rehearsed": trainer.state.log_history[-1]["rehearsal/nll"],
        "parameters": ppo_task.trainable(trainer),
        "pool": None if pool is None else (pool.prompts, len(pool.responses), len(pool.scores), pool.categories),
        "dataset": ppo_task.make_prompts(9).to_dict(),
        "prompts": trainer.drawn[-2:],
    }


def shown(folder: Path) -> dict[str, Any]:
    """Responses to five prompts, which two processes cannot share evenly, in batches of two."""
    trainer = _trainer(folder, prompts=8, updates=1, per_device_eval_batch_size=2)
    trainer.eval_dataset = trainer.train_dataset.select(range(5))
    return {
        "prompts": list(trainer.eval_dataset["prompt"]),
        "all": trainer.completion_log.show(0, first_batch=False),
        "first": trainer.completion_log.show(0, first_batch=True),
    }


def missing(folder: Path) -> dict[str, Any]:
    """Three updates: in the second, no response of one process has a reward; in the third, half of all lack one."""
    trainer = _trainer(folder, prompts=24, updates=3, whiten_scores=True, reward_normalization="batch")

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        step, second = trainer.state.global_step, PartialState().process_index == 1
        scores = ppo_task.share_of_yes(prompts, completions)
        return [None if step == 1 and second or step == 2 and i % 2 else score for i, score in enumerate(scores)]

    trainer.rewards.functions = [reward]
    trainer.rewards.transforms = [RunningMean()]
    trainer.train()
    return _seen(trainer) | {"unscored": trainer.rewards.unscored.total}


def failed(folder: Path) -> dict[str, Any]:
    """The error in each process when a reward function raises in one of them, and when it returns NaN in one."""
    return {
        "raised": _stopped(folder / "raised", lambda count: 1 / 0),
        "nan": _stopped(folder / "nan", lambda count: [float("nan")] * count),
    }


def _stopped(folder: Path, failing: Callable[[int], list[float]]) -> dict[str, Any]:
    trainer = _trainer(folder, prompts=24, updates=3)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        fails = PartialState().process_index == 1 and trainer.state.global_step == 1
        return failing(len(prompts)) if fails else ppo_task.share_of_yes(prompts, completions)

    trainer.rewards.functions = [reward]
    kind, message = _end(trainer)
    PartialState().wait_for_everyone()
    return {"kind": kind, "message": message, "checkpoints": sorted(p.name for p in folder.glob("checkpoint-*"))}


def diverged(folder: Path) -> tuple[str, str, bool]:
    """The error in each process when gradients are NaN in one of them, and whether its weights are still finite."""
    trainer = _trainer(folder, prompts=24, updates=1)
    if PartialState().process_index == 1:
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = lambda loss, **kwargs: backward(loss * float("nan"), **kwargs)
    kind, message = _end(trainer)
    return kind, message, all(value.isfinite().all() for value in ppo_task.trainable(trainer).values())


def refused(folder: Path) -> tuple[str, str]:
    """The error in each process when forward passes are wrong in one of them."""
    logprobs = forward.logprobs
    if PartialState().process_index == 1:
        forward.logprobs = lambda *arguments: tuple(found + 1 for found in logprobs(*arguments))
    try:
        return _end(_trainer(folder, prompts=24, updates=1))
    finally:
        forward.logprobs = logprobs


def _end(trainer: Any) -> tuple[str, str]:
    """The type and message of the error that training ends with."""
    try:
        trainer.train()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def main(output: str, *names: str) -> None:
    """Run the named functions; each process writes its results to ``output/RANK.pt``."""
    torch.set_num_threads(1)
    folder = Path(output)
    write_result(folder, {name: globals()[name](folder / name) for name in names})


if __name__ == "__main__":
    main(*sys.argv[1:])
