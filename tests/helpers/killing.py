"""Runs in processes of their own, quick to start and slow enough to be killed on the way."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

# What a run imports; loaded once, and every process begins with it.
_PRELOADED = [
    "trl_rlaif.pipeline.runner",
    "trl_rlaif.pipeline.work.sample",
    "trl_rlaif.pipeline.work.label",
    "trl_rlaif.labels.calibration",
    "trl_rlaif_distilled",
    "trl.trainer.reward_trainer",  # which loads peft and bitsandbytes, as a run does
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "datasets",
]


def start_labeling(recipe: Path, output: Path, seconds: float) -> BaseProcess:
    """Start or resume a run whose every label takes so many seconds more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_label, args=(str(recipe), str(output), seconds))
    process.start()
    return process


def _label(recipe: str, output: str, seconds: float) -> None:
    from trl_rlaif.labels import LabelStore
    from trl_rlaif.pipeline.runner import run_recipe
    from trl_rlaif.plugins import installed_plugins
    from trl_rlaif.recipe import parse_recipe

    add = LabelStore.add

    def add_slowly(self: LabelStore, *arguments: object) -> None:
        add(self, *arguments)
        time.sleep(seconds)

    LabelStore.add = add_slowly
    plugins = installed_plugins()
    run_recipe(parse_recipe(recipe, registry=plugins.registry), plugins, output, resume=True)
