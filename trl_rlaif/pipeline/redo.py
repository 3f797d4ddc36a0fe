"""Which stages a run redoes, and why: those whose inputs are not the ones that they were made from."""

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
# Asked before a run redoes anything, with what it would redo and why; whether to go on.
Confirm = Callable[[str], bool]


@dataclass(frozen=True)
class Planned:
    """A stage of a run.

    Args:
        stage: The stage.
        inputs: What it is made from now.
        fingerprint: Of what it is complete with, or will be made from.
        why: What has changed since it began, a sentence each; empty where it is new, or may be kept.
        migrated: Its folder is of the first version, which recorded a fingerprint alone.
    """

    stage: Stage
    inputs: Inputs
    fingerprint: str
    why: tuple[str, ...] = ()
    migrated: bool = False


def plan(
    recipe: Recipe, folder: RunFolder, known: Mapping[str, str] | None = None, *, without: Collection[str] = ()
) -> dict[str, Planned]:
    """Compare every active stage's inputs with those that it was made from; nothing in the folder is changed.

    Args:
        recipe: As it is written: ``auto`` is ``auto`` on every machine.
        known: Fingerprints of what the stages depend on besides each other; None: of the run before this one, as it is
            (``lineage.fingerprints_of``).
        without: Stages that are not part of the run.

    Raises:
        UserError: A later version wrote the folder.
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
    """The stages to redo: all whose inputs have changed, or those among ``only``."""
    found = [each for name, each in planned.items() if each.why and name in (only or planned)]
    return found if any(not each.stage.always for each in found) else []


def describe(folder: RunFolder, stages: Sequence[Planned]) -> str:
    """What would be redone, and why."""
    lines = [f"  {p.stage.name}: {'; '.join(p.why)}" for p in stages if not p.stage.always]
    return "\n".join([
        f"{folder.path}: the inputs of these stages have changed, so they are redone:", *lines,
        f"Their outputs are not deleted; they move to {folder / artifacts.SUPERSEDED}.",
    ])  # fmt: skip


def agree(message: str, confirm: Confirm | None) -> None:
    """Say what is redone, or ask, before anything is changed.

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
    """Move away what is redone, and record the inputs of a first version's stages that are kept."""
    superseding.finish(folder)
    for name, each in planned.items():
        if each.migrated and not each.why:
            known = {"fingerprint": each.fingerprint, "inputs": each.inputs.to_dict()}
            folder.write_marker(name, folder.marker(name) | known)
    superseding.supersede(folder, [*_overwritten(folder, planned), *(each.stage for each in stages)])


def _overwritten(folder: RunFolder, planned: Mapping[str, Planned]) -> list[Stage]:
    """Stages that the recipe no longer has, and whose outputs one that it has will write: people's ``preferences``."""
    due = [each.stage for name, each in planned.items() if not folder.is_complete(name, each.fingerprint) or each.why]
    written = {name for stage in due for name in stage.companions}
    return [stage for stage in STAGES.values() if stage.name not in planned and written & set(stage.outputs)]
