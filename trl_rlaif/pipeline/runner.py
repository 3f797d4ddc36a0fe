"""Runs a recipe's stages in order in a run's folder, from the start or resumed."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif import __version__, distributed
from trl_rlaif.errors import UserError
from trl_rlaif.files import is_signed, sealed, signed, write_atomically
from trl_rlaif.pipeline import artifacts, digests, machine, redo, superseding
from trl_rlaif.pipeline.earlier_time import earlier_time
from trl_rlaif.pipeline.forecast import forecast
from trl_rlaif.pipeline.lineage import check_previous
from trl_rlaif.pipeline.machine import Machine
from trl_rlaif.pipeline.redo import Confirm, Planned
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import Forecast, Publisher, publishing, say
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.base_model import check_base
from trl_rlaif.recipe.sections import STAGES
from trl_rlaif.report.formatting import duration

PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "torch", "bitsandbytes")


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run.

    Args:
        resume: Resume the run in the folder, if there is one, and skip completed stages.
        only: Run only these stages; those that they depend on must be complete.
        command: How the run was started, for the report.
        shard: ``i/n`` labels this machine's part of the pairs, and ends there. The labels.jsonl of all machines,
            joined, equals that of a single machine.
        donors: Other runs, from which stages completed with the same inputs are copied.
        confirm: Receives which stages ``resume`` redoes and why, before anything is changed, and returns whether to
            continue. None continues. Stages in ``only`` are redone without asking.
        began: The machine whose dtypes are used; None: the one that started this run.
        without: Stages of the recipe that are not run.
    """

    resume: bool = False
    only: Sequence[str] = ()
    command: str = ""
    shard: str | None = None
    donors: Sequence[RunFolder] = ()
    confirm: Confirm | None = None
    began: Machine | None = None
    without: Sequence[str] = ()


def run_recipe(recipe: Recipe, plugins: Plugins, output: str | Path, **options: Any) -> RunFolder:
    """Run a recipe; one with rounds is passed to ``rounds.run_rounds``.

    Args:
        recipe: Validated.
        plugins: Plugins with the components that it names.
        output: The run's folder.
        options: Fields of RunOptions.

    Raises:
        UserError: The folder already contains a run, is not writable, or lacks a stage's dependency; the base does not
            support the recipe; or ``confirm`` refused.
    """
    how = RunOptions(**options)
    _check_first(recipe, how.shard)
    if recipe.rounds is not None and recipe.rounds.number > 1:
        from trl_rlaif.pipeline.rounds import run_rounds

        return run_rounds(recipe, plugins, output, how)
    folder, only = RunFolder(output), how.only
    with folder.locked():
        check_unused(folder, how)
        planned = redo.plan(recipe, folder, without=how.without)
        began = how.began or distributed.agreed(lambda: machine.machine_of(folder))
        recipe = machine.settled(recipe, began)
        machine.say_where(recipe, began)
        _check_only(folder, planned, only)
        supersede_changed(folder, planned, only, None if only else how.confirm)
        prepare(recipe, folder, how.command, began)
        known = {name: each.fingerprint for name, each in planned.items()}
        ahead = _ahead(folder, planned, only) if how.shard is None else []
        predicted = forecast(recipe, ahead)
        if ahead:
            _say_ahead(planned, ahead, predicted, earlier_time(folder, planned, ahead, began["processor"]))
        with publishing(folder.state, known, predicted) as publisher:
            run_stages(recipe, plugins, folder, planned, how, publisher)
        if how.shard is None and not how.without:
            say_outcome(folder)
    return folder


def _check_first(recipe: Recipe, shard: str | None) -> None:
    """Checks before any expensive work."""
    if shard is not None:
        _check_shard(recipe, shard)
    check_base(recipe)
    machine.check_machine(recipe)
    check_previous(recipe)


def supersede_changed(
    folder: RunFolder, planned: Mapping[str, Planned], only: Sequence[str], confirm: Confirm | None
) -> None:
    """Move away redone stages' outputs, if ``confirm`` agrees, and check kept outputs against their digests."""
    changed = redo.redone(planned, only)
    if changed:
        redo.agree(redo.describe(folder, changed), confirm)
    distributed.wait()  # until all processes have read the folder
    redo.apply(folder, planned, changed)
    digests.check(folder, [each.stage for name, each in planned.items() if name not in only and not each.why])


def _ahead(folder: RunFolder, planned: Mapping[str, Planned], only: Sequence[str]) -> list[Stage]:
    """The stages still to run."""
    due = [name for name, each in planned.items() if not folder.is_complete(name, each.fingerprint)]
    return [planned[name].stage for name in due if name in (only or due)]


def say_outcome(folder: RunFolder) -> None:
    """Print results, warnings and next steps at the end of the run, as in the report's first lines."""
    from trl_rlaif.report.outcome import outcome
    from trl_rlaif.report.run_data import read_run

    for line in outcome(read_run(folder.path, labels=False), str(folder.path)):
        say(line)


def _say_ahead(
    planned: Mapping[str, Planned], ahead: Sequence[Stage], known: Forecast | None, took: tuple[str, float] | None
) -> None:
    """Print at the start which stages will run, which takes the most time, and how long they may take."""
    names = [stage.name for stage in ahead]
    kept = [name for name in planned if name not in names]
    said = f"To run: {', '.join(names)}." + (f" Kept: {', '.join(kept)}." if kept else "")
    shares = known.shares if known else {}
    if len(shares) > 1:
        longest = max(shares, key=lambda name: shares[name])
        said += f" Most of the time goes to {longest} ({shares[longest]:.0%} of the predicted time)."
    if took is not None:
        said += f" With these settings, {took[0]} took {duration(took[1])} for these stages."
    say(said + (" A time estimate follows after the first minute of computation." if shares else ""))


def check_unused(folder: RunFolder, how: RunOptions) -> None:
    """Reject a folder that already contains a run, unless ``resume`` or ``only`` is set.

    Raises:
        UserError: It contains a run.
    """
    if folder.is_used and not (how.resume or how.only):
        raise UserError(
            "This folder already contains a run.",
            where=str(folder.path),
            fix="Add --resume to resume it, or name another folder with --output.",
        )


def prepare(recipe: Recipe, folder: RunFolder, command: str, began: Machine) -> None:
    """Write recipe.yaml."""
    distributed.wait()  # until all processes have read the folder
    _write_recipe(recipe, folder, command, began)


def _check_shard(recipe: Recipe, shard: str) -> None:
    from trl_rlaif.pipeline.context import Shard

    Shard.parse(shard)
    if recipe.rounds is not None and recipe.rounds.number > 1:
        what = "--shard divides the labeling of one run, but this recipe labels in each of its rounds."
        raise UserError(what, fix="Leave it out.")
    if recipe.label is None:
        raise UserError("--shard divides the labeling, and this recipe has no 'label'.")
    judge = recipe.model if recipe.label.judge == "same" else recipe.label.judge
    if getattr(judge, "dtype", "") == "auto":
        raise UserError(
            "With dtype: auto, machines that share the labeling may use different types for the judge's weights.",
            where=recipe.line(("label", "judge")),
            fix="Set dtype: float32 or bfloat16 for the judge, or in model if it judges itself.",
        )


def _check_only(folder: RunFolder, planned: dict[str, Planned], only: Sequence[str]) -> None:
    unknown = [stage for stage in only if stage not in planned]
    if unknown:
        raise UserError(f"This recipe has no stage '{unknown[0]}'.", fix=f"It has: {', '.join(planned)}.")
    for stage in only:
        for earlier in list(planned)[: list(planned).index(stage)]:
            if earlier not in only and (planned[earlier].why or not folder.is_complete(earlier)):
                raise UserError(
                    f"'{stage}' depends on '{earlier}', which has not completed in {folder.path} with these settings.",
                    fix=f"Run it first: --only {earlier},{stage}",
                )


def run_stages(
    recipe: Recipe,
    plugins: Plugins,
    folder: RunFolder,
    planned: dict[str, Planned],
    how: RunOptions,
    publisher: Publisher,
) -> None:
    """Run the planned stages in order."""
    from transformers import set_seed

    from trl_rlaif.models.kernels import kernels
    from trl_rlaif.pipeline.context import Context, Shard

    only, shard = how.only, how.shard
    distributed.wait()
    context = Context(recipe, folder, plugins, Shard.parse(shard) if shard is not None else None)
    for stage, each in planned.items():
        fingerprint, inputs = each.fingerprint, each.inputs.to_dict()
        if only and stage not in only:
            continue
        distributed.wait()  # until the first process has written its files
        if folder.is_complete(stage, fingerprint) and how.resume and not _is_outdated(folder, each.stage):
            say(f"{stage}: already complete")
            if shard is not None and stage == "label":
                return
            continue
        known = [] if each.stage.always or only else [*how.donors, *superseding.donors(folder)]
        donor = next((run for run in known if run.is_complete(stage, fingerprint)), None)
        resumed = folder.is_begun(stage, fingerprint)
        distributed.wait()
        if donor is not None:
            superseding.adopt(folder, each.stage, fingerprint, donor, inputs)
            publisher.skip(stage)
            say(f"{stage}: the same as that of {donor.path.name}")
            continue
        superseding.begin(folder, each.stage, fingerprint, inputs)
        distributed.wait()
        before = publisher.begin(stage, resumed=resumed)
        started = time.monotonic()
        # New adapters are initialized before any trainer sets its seed; a resumed run must get the same ones.
        set_seed(recipe.run.seed)
        with kernels(recipe.run.kernels):
            numbers = each.stage.run(context)
        if "seconds" in numbers:
            numbers["seconds"] += before
        folder.add_results(stage, numbers)
        if shard is not None and stage == "label":
            say(f"label: share {shard} done. {each.stage.line(numbers)}")
            say(f"Join the machines' {artifacts.LABELS} into one, and run without --shard: {folder / artifacts.LABELS}")
            return
        digests.complete(folder, each.stage, fingerprint)
        gc.collect()  # trainers form reference cycles: otherwise a stage's model would outlive it
        say(f"{stage}: done in {time.monotonic() - started:.0f} s. {each.stage.line(numbers)}".rstrip())
    distributed.wait()


def _is_outdated(folder: RunFolder, stage: Stage) -> bool:
    """Whether a complete ``always`` stage is older than other stages or human votes, or its first output is missing."""
    if not stage.always:
        return False
    own = folder.state / artifacts.marker_of(stage.name)
    made = [*(folder.state / artifacts.marker_of(name) for name in STAGES), folder / artifacts.VOTES]
    changed = max(path.stat().st_mtime_ns for path in made if path.exists())
    return own.stat().st_mtime_ns < changed or not all((folder / name).exists() for name in stage.outputs[:1])


def _write_recipe(recipe: Recipe, folder: RunFolder, command: str, began: Machine) -> None:
    versions = {"trl-rlaif": __version__} | {name: found for name in PACKAGES if (found := installed_version(name))}
    where = {} if began["dtype"] == "auto" else {"machine": sealed(began)}
    content = recipe.to_dict() | where | {"format": artifacts.FORMAT, "versions": versions, "command": command}
    path, text = folder / artifacts.RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if path.exists() and not is_signed(path.read_bytes()):
        say(f"Warning: {path} was not what the run wrote. It is written again.")
    write_atomically(path, signed(text))


def installed_version(package: str) -> str | None:
    """The package's version; None if not installed: bitsandbytes is not built for every system."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
