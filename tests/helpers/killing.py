"""Runs in processes of their own, quick to start and slow enough to be killed on the way."""

from __future__ import annotations

import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import forked


def start_labeling(recipe: Path, output: Path, seconds: float) -> BaseProcess:
    """Start or resume a run whose every label takes so many seconds more."""
    return forked.start(_label, str(recipe), str(output), seconds)


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
