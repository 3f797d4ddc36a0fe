"""The earlier runs or rounds that a run continues, reusing their policy, reward model and taught judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_rlaif.errors import UserError
from trl_rlaif.pipeline import artifacts
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import previous
from trl_rlaif.recipe import Recipe

# Stages whose outputs a run reuses from earlier runs.
_TAKEN_UP = ("sft", "judge", "label", "reward", "rl")


def previous_runs(recipe: Recipe) -> list[RunFolder]:
    """The runs before this one, the latest first; empty if it starts from the base.

    Raises:
        UserError: An earlier run has no recipe.yaml, or the runs continue each other in a cycle.
    """
    return runs_from(recipe.previous)


def runs_from(place: str | None) -> list[RunFolder]:
    """The run in a folder (all its rounds, if it has several) and the runs before it, the latest first.

    Raises:
        UserError: As in ``previous_runs``.
    """
    found: list[RunFolder] = []
    while place is not None:
        if not (Path(place) / artifacts.RECIPE).is_file() or Path(place).resolve() in (run.path for run in found):
            what = "The run that this one continues has no recipe.yaml."
            raise UserError(what, where=place, fix="Restore it, or name another one as rounds.previous.")
        run = RunFolder(place)
        rounds = run.recipe().get("rounds") or {}
        number = rounds.get("number", 1)
        # The folder of a run in rounds contains the outputs of the last round.
        found += [run.round(each) for each in range(number, 0, -1)] if number > 1 else [run]
        place = rounds.get("previous")
    return found


def fingerprints_of(runs: Sequence[RunFolder]) -> dict[str, str]:
    """Fingerprints of the stages that a run continuing these may depend on, by their names in its inputs."""
    found = {}
    for stage in _TAKEN_UP:
        run = next((run for run in runs if run.is_complete(stage)), None)
        if run is not None:
            found[previous(stage)] = run.marker(stage)["fingerprint"]
    return found


def check_previous(recipe: Recipe) -> None:
    """Check that the previous run has everything that this one reuses.

    Raises:
        UserError: It has no policy, trained another model, or lacks a stage sft or judge that this recipe has.
    """
    runs = previous_runs(recipe)
    if not runs:
        return
    where, folder = recipe.line(("rounds", "previous")), runs[0].path
    if not runs[0].is_complete("rl"):
        raise UserError(f"The stage 'rl' has not completed in {folder}.", where=where, fix="Complete that run first.")
    model = runs[0].recipe()["model"]["path"]
    if Path(model).name != Path(recipe.model.path).name:  # on another machine, the same model may have another path
        what = f"The run in {folder} trained {model}, but this recipe names {recipe.model.path}."
        raise UserError(what, where=where, fix="Name the same model.path.")
    for stage in ("sft", "judge"):
        if getattr(recipe, stage) is not None and not any(run.is_complete(stage) for run in runs):
            what = f"The stage '{stage}' continues from the previous run, but {folder} has no such stage."
            raise UserError(what, where=recipe.line((stage,)), fix=f"Leave '{stage}' out.")
