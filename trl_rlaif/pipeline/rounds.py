"""Runs a recipe's stages from sample to rl several times, each time from the latest policy.

A round is an ordinary run in its own folder: its recipe is the given one with another seed, and it continues from the
previous round. The run's own folder takes over the last round's outputs, for evaluate and report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trl_rlaif import distributed
from trl_rlaif.errors import UserError
from trl_rlaif.generation import derived_seed
from trl_rlaif.pipeline import artifacts, digests, lineage, machine, redo, runner, superseding
from trl_rlaif.pipeline.redo import Planned
from trl_rlaif.pipeline.results import RoundRow
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import RunOptions
from trl_rlaif.pipeline.stage import previous
from trl_rlaif.pipeline.stages import ENDS, ROUND, STAGES
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import Publisher, publishing, say
from trl_rlaif.recipe import Recipe

KEY = "rounds"
# A run's folder and the plan of its stages.
_Plan = tuple[RunFolder, dict[str, Planned]]


def has_rounds(recipe: Recipe) -> bool:
    """Whether a recipe has more than one round."""
    return recipe.rounds is not None and recipe.rounds.number > 1


def round_recipe(recipe: Recipe, number: int, folder: RunFolder) -> Recipe:
    """The recipe of one round.

    The first one is the recipe without rounds. Later ones use other seeds: with the same seeds, a policy that has
    changed little would give nearly the same responses, and the judge nearly the same labels. The prompts stay the
    same: results are comparable between rounds, and the reward model's held-out prompts are never trained on.

    Args:
        number: From 1.
        folder: The run's folder, with all rounds.
    """
    name = f"{recipe.run.name[:90]}-{number}"
    if number == 1:
        rounds = recipe.rounds.model_copy(update={"number": 1}) if recipe.previous else None
        return replace(recipe, run=recipe.run.model_copy(update={"name": name}), rounds=rounds)
    place = recipe.line((KEY,))
    seeds = {"run": recipe.run.seed, "sample": recipe.sample.seed}
    drawn = {section: derived_seed(seed, "round", number) for section, seed in seeds.items() if seed is not None}
    places = {(section, "seed"): place for section in drawn} | {(KEY, "previous"): place}
    before = str(folder / artifacts.ROUNDS / str(number - 1))
    return replace(
        recipe,
        run=recipe.run.model_copy(update={"name": name, "seed": drawn["run"]}),
        sample=recipe.sample.model_copy(update={"seed": drawn.get("sample")}),
        rounds=recipe.rounds.model_copy(update={"number": 1, "previous": before}),
        places={**recipe.places, **places} if recipe.places else {},
    )


def changes(recipe: Recipe, folder: RunFolder) -> list[str]:
    """What a run, with or without rounds, would redo and why: one message per run folder."""
    return _messages(_planned(recipe, folder) if has_rounds(recipe) else [(folder, redo.plan(recipe, folder))])


def _messages(planned: Sequence[_Plan]) -> list[str]:
    found = [(place, redo.redone(plan)) for place, plan in planned]
    return [redo.describe(place, changed) for place, changed in found if changed]


def _planned(recipe: Recipe, folder: RunFolder) -> list[_Plan]:
    """Each round's folder and plan, then the run's own folder with the plan of evaluate and report."""
    found: list[_Plan] = []
    known = lineage.fingerprints_of(lineage.previous_runs(recipe))
    for number in range(1, recipe.rounds.number + 1):
        place, part = folder.round(number), round_recipe(recipe, number, folder)
        plan = redo.plan(part, place, known, without=ENDS)
        fingerprints = {name: each.fingerprint for name, each in plan.items()}
        ends = known | fingerprints
        known = known | {previous(name): fingerprint for name, fingerprint in fingerprints.items()}
        found.append((place, plan))
    return [*found, (folder, redo.plan(_end(recipe, part), folder, ends, without=ROUND))]


def _end(recipe: Recipe, last: Recipe) -> Recipe:
    """The recipe of the run's own folder: the last round's, evaluated with the whole run's seed."""
    return replace(last, run=recipe.run)


def run_rounds(recipe: Recipe, plugins: Plugins, output: str | Path, how: RunOptions) -> RunFolder:
    """Run every round of a recipe, then its stages evaluate and report.

    Args:
        recipe, plugins, output: As in ``run_recipe``.
        how: Without ``shard``, and with an empty ``without``.

    Returns:
        The folder: ``rounds/N`` is the run of round N, and ``rounds`` in results.json has a row for each.

    Raises:
        UserError: As in ``run_recipe``; or ``only`` names a stage without its round (as in ``2/label``).
    """
    folder, count = RunFolder(output), recipe.rounds.number
    with folder.locked():
        runner.check_unused(folder, how)
        began = how.began or distributed.agreed(lambda: machine.machine_of(folder))
        planned = _planned(recipe, folder)
        only_in, only_ends = _sorted_out(how.only, planned)
        if messages := [] if how.only else _messages(planned):
            redo.agree("\n".join(messages), how.confirm)
        runner.prepare(machine.settled(recipe, began), folder, how.command, began)
        how = replace(how, began=began, confirm=lambda _: True)  # already confirmed
        stages = {_name(number): "" for number in range(1, count + 1)}
        stages |= {name: each.fingerprint for name, each in planned[-1][1].items()}
        with publishing(folder.state, stages) as publisher:
            for number in only_in if how.only else range(1, count + 1):
                say(f"Round {number} of {count}")
                publisher.begin(_name(number))
                if how.only:
                    own = replace(how, only=only_in[number])
                else:
                    # Another run, or this one before it had rounds, may have made the same from the same inputs.
                    earlier = [*(run.round(number) for run in how.donors if _has_round(run, number)), *how.donors]
                    own = replace(how, resume=True, donors=[*earlier, folder], without=ENDS)
                part = round_recipe(recipe, number, folder)
                runner.run_recipe(part, plugins, folder.round(number).path, **vars(own))
            if only_ends or not how.only:
                _finish(recipe, plugins, folder, replace(how, resume=not how.only, only=only_ends), publisher)
        if not how.only:
            runner.say_outcome(folder)
    return folder


def _name(number: int) -> str:
    return f"round {number}"


def _sorted_out(only: Sequence[str], planned: Sequence[_Plan]) -> tuple[dict[int, list[str]], list[str]]:
    """The stages named by ``--only``: those of rounds, by round, and those after the last round."""
    *rounds, (_, ends) = planned
    found: dict[int, list[str]] = {}
    for entry in only:
        number, slash, stage = entry.rpartition("/")
        if slash and number in map(str, range(1, len(rounds) + 1)):
            found.setdefault(int(number), []).append(stage)
        elif entry not in ends:
            what = f"This run has {len(rounds)} rounds, each with its own stages; '{entry}' names none of them."
            raise UserError(what, fix="Write --only 2/label for a stage of the second round, or evaluate, or report.")
    after = [entry for entry in only if entry in ends]
    for place, plan in rounds if after else []:
        due = [name for name, each in plan.items() if each.why or not place.is_complete(name)]
        if due:
            what = f"'{after[0]}' depends on '{due[0]}', which has not completed in {place.path} with these settings."
            raise UserError(what, fix="Run all rounds first: --resume without --only.")
    return dict(sorted(found.items())), after


def _has_round(run: RunFolder, number: int) -> bool:
    return (run / artifacts.ROUNDS / str(number) / artifacts.RECIPE).is_file()


def _finish(recipe: Recipe, plugins: Plugins, folder: RunFolder, how: RunOptions, publisher: Publisher) -> None:
    """Take over the last round's outputs, and evaluate them."""
    rounds = [folder.round(number) for number in range(1, recipe.rounds.number + 1)]
    last = round_recipe(recipe, len(rounds), folder)
    planned = redo.plan(last, folder, without=ENDS)
    distributed.wait()
    redo.apply(folder, planned, [each for each in planned.values() if each.why])
    # From before the run had rounds: sft and judge now belong to the first round.
    superseding.supersede(folder, [STAGES[name] for name in ROUND if name not in planned])
    digests.check(folder, [each.stage for each in planned.values()])
    for name, each in planned.items():
        own = folder.is_complete(name, each.fingerprint) and digests.made_together(folder, rounds[-1], name)
        if not own:  # or --only has remade it
            superseding.adopt(folder, each.stage, each.fingerprint, rounds[-1], each.inputs.to_dict())
    seconds = sum(run.results_of(stage).get("seconds") or 0.0 for run in rounds[:-1] for stage in ROUND)
    folder.add_results(KEY, {"rows": [_row(run) for run in rounds], "seconds": seconds})
    fingerprints = {name: each.fingerprint for name, each in planned.items()}
    known = lineage.fingerprints_of(lineage.previous_runs(last)) | fingerprints
    distributed.wait()
    due = redo.plan(_end(recipe, last), folder, known, without=ROUND)
    runner.supersede_changed(folder, due, how.only, how.confirm)
    runner.run_stages(_end(recipe, last), plugins, folder, due, how, publisher)


def _row(run: RunFolder) -> RoundRow:
    sample, reward, rl = map(run.results_of, ("sample", "reward", "rl"))
    before = reward.get("before") or {}
    accuracy = {"rate": reward.get("accuracy"), "interval": reward.get("accuracy_interval")}
    return {
        "pairs": sample["pairs"],
        "tokens": sample.get("tokens"),
        "accuracy_before": before.get("all"),
        "accuracy_before_held_out": before.get("held_out"),
        "accuracy": accuracy if accuracy["rate"] is not None else None,
        "score_first": rl.get("score_first"),
        "score_last": rl.get("score_last"),
        "kl_last": rl.get("kl_last"),
        "implicit_first": rl.get("accuracy_first"),
        "implicit_last": rl.get("accuracy_last"),
    }
