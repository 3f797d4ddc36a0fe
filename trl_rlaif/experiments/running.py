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
    """Run every variant of a recipe, and judge their responses and the initial policy's against each other.

    A stage that an earlier variant completed with the same settings and inputs is reused.

    Args:
        recipe: A recipe with variants.
        plugins: Plugins that provide its components.
        output: The comparison's folder.
        resume: Resume in a folder that already contains a comparison.
        command: The command that started it, for the report.
        confirm: As in ``run_recipe``; called once for all variants.

    Returns:
        The folder: ``variants/NAME`` is a variant's run, ``labels.jsonl`` contains all pairwise judgments, and
        ``results.json`` their results under ``compare``.

    Raises:
        UserError: The folder is already used, or is not writable.
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
    """Rename the variants' folder of early versions, which called them arms."""
    if distributed.is_first() and (folder / "arms").is_dir() and not (folder / artifacts.VARIANTS).exists():
        (folder / "arms").rename(folder / artifacts.VARIANTS)


def _ask(variants: Mapping[Path, Recipe], confirm: Confirm | None) -> None:
    """Announce, or ask to confirm, what all variants will redo and why, before any of them does."""
    from trl_rlaif.pipeline.rounds import changes

    messages: list[str] = []
    for place, variant in variants.items():
        folder = RunFolder(place) if place.exists() else None
        messages += changes(variant, folder) if folder else []
    if messages:
        redo.agree("\n".join(messages), confirm)


def _of_variant(run: RunFolder) -> dict[str, Any]:
    """Metrics from a variant's own results; None if missing."""
    label, reward, rl = map(run.results_of, ("label", "reward", "rl"))
    return {
        "label_agreement": label.get("agreement"),
        "reward_accuracy": reward.get("accuracy"),
        "reward_agreement": reward.get("agreement"),
        "kl": rl.get("kl_last"),
        "score_first": rl.get("score_first"),
        "score_last": rl.get("score_last"),
        # Including stages reused from another variant: the time that this variant takes by itself.
        "seconds": sum(run.results_of(stage).get("seconds") or 0.0 for stage in run.results()),
    }


def summary(numbers: CompareResults) -> str:
    """The last line of a comparison: the contestants of each set, best first, with their win rates."""
    ranked = [f"{name}: {_ranking(s['overall'])}" for name, s in numbers["sets"].items()]
    return "; ".join(filter(None, (*ranked, spent(numbers))))


def _ranking(overall: dict[str, dict[str, Any] | None]) -> str:
    judged = [(numbers["win_rate"], name) for name, numbers in overall.items() if numbers]
    best_first = sorted(judged, key=lambda one: one[0], reverse=True)
    return ", ".join(f"{name} {rate:.0%}" for rate, name in best_first)
