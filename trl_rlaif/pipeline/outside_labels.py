"""Opens a run's folder for labeling outside its stage label: with batch files or Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_rlaif.data import Pair
from trl_rlaif.errors import UserError
from trl_rlaif.labels import LabelKey
from trl_rlaif.pipeline import artifacts, redo
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.plugins import Plugins
from trl_rlaif.recipe import Recipe


@contextmanager
def opened_to_label(recipe: Recipe, plugins: Plugins, output: Path) -> Iterator[Context]:
    """Open a run's folder and lock it against other processes.

    Args:
        recipe: Its section label may still change.
        plugins: The installed plugins.
        output: The run's folder.

    Raises:
        UserError: An input of the labels, such as the pairs, is incomplete or was made with other settings.
    """
    begun = (output / artifacts.RECIPE).exists()
    if begun:
        folder = RunFolder(output)
        with folder.locked():
            planned = redo.plan(recipe, folder)
            before = [name for name in STAGES["label"].after(recipe) if name in planned]
            lacking = [name for name in before if planned[name].why or not folder.is_complete(name)]
            if not lacking:
                yield Context(recipe, folder, plugins)
                return
    what = "The run has no pairs yet, or they were made with other settings."
    if begun and "sample" not in lacking:
        what = f"'label' depends on '{lacking[0]}', which has not completed with these settings."
    needed = ",".join(lacking if begun else ["sample"])
    raise UserError(what, where=str(output), fix=f"Run first: trl-rlaif run RECIPE --only {needed}.")


def distinct(key: LabelKey, pairs: Iterable[Pair]) -> list[Pair]:
    """One pair per label: the last of those with the same key."""
    return list({key.of(pair): pair for pair in pairs}.values())
