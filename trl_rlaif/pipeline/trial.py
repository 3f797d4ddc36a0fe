"""A recipe's settings for TRL's trainers, tried before anything is computed."""

from __future__ import annotations

import importlib
import tempfile
from typing import TYPE_CHECKING

from trl_rlaif import distributed
from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.memory.settings import with_settings
from trl_rlaif.pipeline.checkpointing import CHECKPOINTING
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES

if TYPE_CHECKING:
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.plugins import Plugins
    from trl_rlaif.recipe import Recipe


def try_settings(recipe: Recipe, plugins: Plugins) -> None:
    """Make the configuration of each trainer from what the recipe writes for it, as its stage will.

    Raises:
        UserError: TRL or transformers refuse one.
    """
    sections = [name for name in CONFIG_CLASSES if (section := getattr(recipe, name)) and section.config]
    if not sections or distributed.processes() > 1:  # several would wait for each other
        return
    from trl_rlaif.pipeline.context import Context
    from trl_rlaif.pipeline.run_folder import RunFolder

    written = {name: getattr(recipe, name).config for name in sections}
    # What settles it says so: the stage will.
    settled = with_settings(recipe, {(n, CHECKPOINTING): of.get(CHECKPOINTING, False) for n, of in written.items()})
    with tempfile.TemporaryDirectory() as folder:
        context = Context(settled, RunFolder(folder), plugins)
        for name in sections:
            _try(context, name)


def _try(context: Context, section: str) -> None:
    if section != "rl":
        importlib.import_module(f"trl_rlaif.pipeline.work.{section}").trainer_config(context)
        return
    algorithm = ALGORITHMS[context.recipe.rl.algorithm]
    if algorithm.config is None:
        from trl_rlaif.pipeline import rl_setup

        rl_setup.config(context)
        return
    work = importlib.import_module(algorithm.run.partition(":")[0])
    config, _ = work.trainer_config(context)
    if algorithm.samples:
        work.scorer_settings(context, config)
