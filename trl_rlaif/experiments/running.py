"""Runs a recipe's variants one after the other, shared stages only once, and compares their results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_rlaif import distributed
from trl_rlaif.pipeline import artifacts, machine, redo
from trl_rlaif.pipeline.redo import Confirm
from trl_rlaif.pipeline.results import CompareResults
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.usage import spent
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import publishing, say
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.variants import KEY


def run_comparison(
    recipe: Recipe,
    plugins: Plugins,
    output: str | Path,
    *,
    resume: bool = False,
    command: str = "",
    confirm: Confirm | None = None,
) -> RunFolder:
    """Run every variant of a recipe, and judge their responses and the start's against each other.

    A stage that an earlier variant completed with the same settings, on the same inputs, is taken over from it.

    Args:
        recipe: With variants.
        plugins: Whose components it names.
        output: The comparison's folder.
        resume: Go on in a folder that is used already.
        command: How it was started, for the report.
        confirm: As of ``run_recipe``, of all variants together.

    Returns:
        The folder: ``variants/NAME`` is the run of a variant, ``labels.jsonl`` holds every judgment between two of
        them, and ``results.json`` under ``compare`` what follows from these.

    Raises:
        UserError: The folder is used already, or is not writable.
    """
    from trl_rlaif.experiments.pairwise import play
    from trl_rlaif.models.kernels import kernels
    from trl_rlaif.pipeline.runner import RunOptions, check_unused, prepare, run_recipe
    from trl_rlaif.report.build import write_report

    machine.check_machine(recipe)
    folder, started = RunFolder(output), time.monotonic()
    places = {name: folder / artifacts.VARIANTS / name for name in recipe.variants}
    with folder.locked():
        check_unused(folder, RunOptions(resume=resume))
        began = distributed.agreed(lambda: machine.machine_of(folder))
        _rename_arms(folder)
        _ask({places[name]: variant for name, variant in recipe.variants.items()}, confirm)
        prepare(machine.settled(recipe, began), folder, command, began)
        with publishing(folder.state, dict.fromkeys([*recipe.variants, KEY], "")) as publisher:
            runs: dict[str, RunFolder] = {}
            for number, (name, variant) in enumerate(recipe.variants.items(), 1):
                say(f"Variant {number} of {len(recipe.variants)}: {name}")
                publisher.begin(name)
                how: dict[str, Any] = {"resume": True, "command": command, "confirm": lambda _: True, "began": began}
                runs[name] = run_recipe(variant, plugins, places[name], donors=list(runs.values()), **how)
            publisher.begin(KEY)
            with kernels(recipe.run.kernels), distributed.dividing():
                numbers = play(recipe, plugins, folder, runs)
            numbers |= {"variants": {name: _of_variant(run) for name, run in runs.items()}}
            numbers["seconds"] = time.monotonic() - started
            folder.add_results(KEY, numbers)
            say(f"{KEY}: done in {numbers['seconds']:.0f} s. {summary(numbers)}")
            if recipe.report is not None and distributed.is_first():
                write_report(folder.path)
    return folder


def _rename_arms(folder: RunFolder) -> None:
    """Variants were called so until 0.1."""
    if distributed.is_first() and (folder / "arms").is_dir() and not (folder / artifacts.VARIANTS).exists():
        (folder / "arms").rename(folder / artifacts.VARIANTS)


def _ask(variants: Mapping[Path, Recipe], confirm: Confirm | None) -> None:
    """Say, or ask, what all variants redo and why, before any of them does."""
    from trl_rlaif.pipeline.rounds import changes

    messages: list[str] = []
    for place, variant in variants.items():
        folder = RunFolder(place) if place.exists() else None
        messages += changes(variant, folder) if folder else []
    if messages:
        redo.agree("\n".join(messages), confirm)


def _of_variant(run: RunFolder) -> dict[str, Any]:
    """What a variant's own results say of it, as far as it has them."""
    label, reward, rl = map(run.results_of, ("label", "reward", "rl"))
    return {
        "label_agreement": label.get("agreement"),
        "reward_accuracy": reward.get("accuracy"),
        "reward_agreement": reward.get("agreement"),
        "kl": rl.get("kl_last"),
        "score_first": rl.get("score_first"),
        "score_last": rl.get("score_last"),
        # Taken over from another variant or not: what this way of aligning takes by itself.
        "seconds": sum(run.results_of(stage).get("seconds") or 0.0 for stage in run.results()),
    }


def summary(numbers: CompareResults) -> str:
    """What the line at a comparison's end says: the contestants of each set, best first, with their win rates."""
    ranked = [f"{name}: {_ranking(s['overall'])}" for name, s in numbers["sets"].items()]
    return "; ".join(filter(None, (*ranked, spent(numbers))))


def _ranking(overall: dict[str, dict[str, Any] | None]) -> str:
    judged = [(numbers["win_rate"], name) for name, numbers in overall.items() if numbers]
    best_first = sorted(judged, key=lambda one: one[0], reverse=True)
    return ", ".join(f"{name} {rate:.0%}" for rate, name in best_first)
