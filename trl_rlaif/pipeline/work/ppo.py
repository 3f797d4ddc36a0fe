"""The stage rl with PPO, REINFORCE or rejection sampling: on one base, with the recipe's rewards."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.files import write_folder
from trl_rlaif.models.shared_model import ADAPTER_FILE, SharedBase
from trl_rlaif.pipeline import artifacts, rl_setup, tracking
from trl_rlaif.pipeline.results import RlResults
from trl_rlaif.pipeline.training import settings_of
from trl_rlaif.rl.ppo.trainer import PPOTrainer
from trl_rlaif.rl.rejection import RejectionTrainer, count_iterations

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context


def run(context: Context) -> RlResults:
    """Train ``policy/`` and ``value/``; return the first and last metrics of training."""

    def train(trainer: PPOTrainer) -> None:
        trainer.train(resume_from_checkpoint=True)
        write_folder(context.folder / artifacts.VALUE, trainer.shared.save_value)

    return _run(context, train)


def run_rejection(context: Context) -> RlResults:
    """The same with rejection sampling, which has no value model."""

    def train(trainer: PPOTrainer) -> None:
        iterations = count_iterations(trainer.selection, context.recipe.rl.config.get("total_episodes"))
        RejectionTrainer.of(trainer, iterations).train(resume_from_checkpoint=True)

    return _run(context, train)


def _run(context: Context, train: Callable[[PPOTrainer], None]) -> dict[str, Any]:
    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer, skipped = build_trainer(context)
    callback = context.callback("rl", "Training the policy")
    callback.attach(trainer)
    tracker = tracking.attach(context, trainer, trainer.shared)
    try:
        train(trainer)
    finally:
        callback.close()
    rl_setup.keep_selection(context, trainer.selection.folder)
    write_folder(context.folder / artifacts.POLICY, lambda folder: trainer.save_model(str(folder)))
    numbers = _numbers(trainer, skipped) | tracking.numbers(tracker) | rl_setup.gpu_memory(context.recipe)
    return numbers | {"seconds": time.monotonic() - started}


def build_trainer(context: Context) -> tuple[PPOTrainer, dict[str, int]]:
    """The trainer for the recipe, and the number of prompts skipped by reason."""
    settings, base = rl_setup.config(context), context.load_base()
    dataset, skipped = rl_setup.prompts(context, base, settings.response_length)
    shared = SharedBase(base, context.start or context.lora, reference=context.reference)
    if (value := _earlier_value(context, trunk=settings.value == "trunk")) is not None:
        shared.load_value(value)
    parts = {
        "reward_model": context.folder / artifacts.REWARD if "reward" in context.recipe.rl.reward_names else None,
        "reward_funcs": rl_setup.reward_functions(context, shared),
        "reward_transforms": context.transforms("rl"),
        "data_selectors": rl_setup.selectors(context),
        "rehearsal_dataset": rl_setup.rehearsal_dataset(context),
    }
    with settings_of(context.recipe, "rl"):
        trainer = PPOTrainer(
            settings, context.tokenizer, shared, train_dataset=dataset, plugins=context.plugins, **parts
        )
    return trainer, skipped


def _earlier_value(context: Context, *, trunk: bool) -> Path | None:
    """The previous run's value model, from which training continues; None if there is none of the same kind."""
    folder = context.previous[0] / artifacts.VALUE if context.previous else None
    same = folder is not None and folder.exists() and (folder / ADAPTER_FILE).exists() != trunk
    return folder if same else None


def _numbers(trainer: Any, skipped: dict[str, int]) -> dict[str, Any]:
    logged = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    numbers = {
        "updates": trainer.state.global_step,
        "episodes": trainer.state.episode,
        "prompts": len(trainer.train_dataset),
        "skipped": skipped,
    }
    if logged:
        numbers |= {
            "score_first": logged[0]["objective/scores"],
            "score_last": logged[-1]["objective/scores"],
            "kl_last": logged[-1]["objective/kl"],
            "ended_first": logged[0]["rollout/ended"],
            "ended_last": logged[-1]["rollout/ended"],
        }
        numbers["spread_last"] = _last_spreads(logged[-10:])
    numbers |= rl_setup.of_rewards(trainer.state.log_history, trainer.rewards.unscored.total)
    if logged and "rehearsal/nll" in logged[0]:
        seconds = {name: sum(entry[f"time/{name}"] for entry in logged) for name in ("rehearsal", "update")}
        numbers["rehearsal"] = {
            "pairs": len(trainer.rehearsal.pairs),
            "nll_first": logged[0]["rehearsal/nll"],
            "nll_last": logged[-1]["rehearsal/nll"],
            "share_of_time": seconds["rehearsal"] / seconds["update"],
        }
    return numbers


def _last_spreads(logged: list[dict[str, float]]) -> dict[str, float]:
    """Spread between prompt categories before and after each reward transform: means over the log entries."""
    found: dict[str, list[float]] = {}
    for entry in logged:
        for name, value in entry.items():
            if name.startswith("spread/"):
                found.setdefault(name.removeprefix("spread/"), []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}
