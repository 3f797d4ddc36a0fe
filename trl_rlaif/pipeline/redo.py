"""Which stages a run redoes, and why: those whose inputs have changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from trl_rlaif.errors import UserError
from trl_rlaif.pipeline import artifacts, superseding
from trl_rlaif.pipeline.first_version import inputs_of
from trl_rlaif.pipeline.inputs import Inputs
from trl_rlaif.pipeline.lineage import fingerprints_of, previous_runs
from trl_rlaif.pipeline.machine import machine_of, settled
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.pipeline.stages import STAGES, active_stages
from trl_rlaif.progress import say
from trl_rlaif.recipe import Recipe

_UNKNOWN = "an earlier version made it from other settings or files and did not record them"
# Called before a run redoes anything, with a message on what and why; returns whether to continue.
Confirm = Callable[[str], bool]


@dataclass(frozen=True)
class Planned:
    """A stage in a run's plan.

    Args:
        stage: The stage.
        inputs: Its current inputs.
        fingerprint: Of the inputs that it was made from, if it is kept, or will be made from.
        why: The changes since it started, a sentence each; empty if it is new or can be kept.
        migrated: Its folder is from the first version, which recorded only a fingerprint.
    """

    stage: Stage
    inputs: Inputs
    fingerprint: str
    why: tuple[str, ...] = ()
    migrated: bool = False


def plan(
    recipe: Recipe, folder: RunFolder, known: Mapping[str, str] | None = None, *, without: Collection[str] = ()
) -> dict[str, Planned]:
    """Compare every active stage's inputs with those that it was made from; the folder is not changed.

    Args:
        recipe: As written: ``auto`` is not resolved.
        known: Fingerprints of the stages' dependencies outside this run; None: those of the previous runs in their
            current state (``lineage.fingerprints_of``).
        without: Stages that are not part of the run.

    Raises:
        UserError: A later version wrote the folder, or its recipe.yaml cannot be read.
    """
    found: dict[str, Planned] = {}
    first_version = folder.recipe()
    known = dict(fingerprints_of(previous_runs(recipe)) if known is None else known)
    active = {name: stage for name, stage in active_stages(recipe).items() if name not in without}
    for name, stage in active.items():
        now, marker = stage.inputs(recipe, known), folder.marker(name)
        if not marker or superseding.is_moving(marker):
            found[name] = Planned(stage, now, now.fingerprint)
        elif "inputs" in marker:
            why = now.changes_since(Inputs(**marker["inputs"]))
            found[name] = Planned(stage, now, now.fingerprint if why else marker["fingerprint"], tuple(why))
        else:
            as_then = settled(recipe, machine_of(folder))
            before = inputs_of(stage, first_version, marker["fingerprint"], as_then, now)
            why = [_UNKNOWN] if before is None else now.changes_since(before)
            why += [f"{name} is redone" for name in now.stages if found[name].why and before is not None]
            found[name] = Planned(stage, now, now.fingerprint, tuple(why), migrated=True)
        known[name] = found[name].fingerprint
    return found


def redone(planned: Mapping[str, Planned], only: Sequence[str] = ()) -> list[Planned]:
    """The stages (of ``only``, if given) with changed inputs; none if all are ``always`` stages."""
    found = [each for name, each in planned.items() if each.why and name in (only or planned)]
    return found if any(not each.stage.always for each in found) else []


def describe(folder: RunFolder, stages: Sequence[Planned]) -> str:
    """The message about the stages to redo, and why."""
    lines = [f"  {p.stage.name}: {'; '.join(p.why)}" for p in stages if not p.stage.always]
    return "\n".join([
        f"{folder.path}: the inputs of these stages have changed, so they are redone:", *lines,
        f"Their outputs are not deleted; they move to {folder / artifacts.SUPERSEDED}.",
    ])  # fmt: skip


def agree(message: str, confirm: Confirm | None) -> None:
    """Print what is redone, or ask, before anything is changed.

    Raises:
        UserError: The answer was no.
    """
    if confirm is None:
        say(message)
    elif not confirm(message):
        raise UserError(
            f"{message}\nNothing was changed.",
            fix="Add --yes to redo them, revert the changes, or name another folder with --output.",
        )


def apply(folder: RunFolder, planned: Mapping[str, Planned], stages: Sequence[Planned]) -> None:
    """Move away the outputs of redone stages, and record the inputs of kept stages from the first version."""
    superseding.finish(folder)
    for name, each in planned.items():
        if each.migrated and not each.why:
            known = {"fingerprint": each.fingerprint, "inputs": each.inputs.to_dict()}
            folder.write_marker(name, folder.marker(name) | known)
    superseding.supersede(folder, [*_overwritten(folder, planned), *(each.stage for each in stages)])


def _overwritten(folder: RunFolder, planned: Mapping[str, Planned]) -> list[Stage]:
    """Stages no longer in the recipe whose outputs a stage will overwrite: ``preferences``, from human choices."""
    due = [each.stage for name, each in planned.items() if not folder.is_complete(name, each.fingerprint) or each.why]
    written = {name for stage in due for name in stage.companions}
    return [stage for stage in STAGES.values() if stage.name not in planned and written & set(stage.outputs)]
