"""Runs a recipe's arms one after the other, each stage that several share only once, and compares what they made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trl_rlaif.artifacts import RunFolder
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import publishing, say
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.arms import ARMS_FOLDER, KEY


def run_comparison(
    recipe: Recipe, plugins: Plugins, output: str | Path, *, resume: bool = False, command: str = ""
) -> RunFolder:
    """Run every arm of a recipe, and judge their responses and the start's against each other.

    A stage that an earlier arm completed with the same settings, on the same inputs, is taken over from it.

    Args:
        recipe: With arms.
        plugins: Whose components it names.
        output: The comparison's folder.
        resume: Go on in a folder that is used already.
        command: How it was started, for the report.

    Returns:
        The folder: ``arms/NAME`` is the run of an arm, ``labels.jsonl`` holds every judgment between two of them, and
        ``results.json`` under ``compare`` what follows from these.

    Raises:
        UserError: The folder is used already, or is not writable.
    """
    from trl_rlaif.comparison.matches import play
    from trl_rlaif.report import write_report
    from trl_rlaif.runner import prepare, run_recipe, summary

    folder, started = RunFolder(output), time.monotonic()
    with folder.locked():
        prepare(recipe, folder, command, used=resume)
        with publishing(folder.state, dict.fromkeys([*recipe.arms, KEY], "")) as publisher:
            runs: dict[str, RunFolder] = {}
            for number, (name, arm) in enumerate(recipe.arms.items(), 1):
                say(f"Arm {number} of {len(recipe.arms)}: {name}")
                publisher.begin(name)
                path, donors = folder / ARMS_FOLDER / name, list(runs.values())
                runs[name] = run_recipe(arm, plugins, path, resume=True, command=command, donors=donors)
            publisher.begin(KEY)
            numbers = play(recipe, plugins, folder, runs)
            numbers |= {"arms": {name: _of_arm(run) for name, run in runs.items()}}
            folder.add_results(KEY, numbers | {"seconds": time.monotonic() - started})
            say(f"{KEY}: done in {time.monotonic() - started:.0f} s. {summary(KEY, numbers)}")
            if recipe.report is not None:
                write_report(folder.path)
    return folder


def _of_arm(run: RunFolder) -> dict[str, Any]:
    """What an arm's own results say of it, as far as it has them."""
    results = run.results()
    label, reward, rl = (results.get(stage) or {} for stage in ("label", "reward", "rl"))
    return {
        "label_agreement": label.get("agreement"),
        "reward_accuracy": reward.get("accuracy"),
        "reward_agreement": reward.get("agreement"),
        "kl": rl.get("kl_last"),
        "score_first": rl.get("score_first"),
        "score_last": rl.get("score_last"),
        # Taken over from another arm or not: what this way of aligning takes by itself.
        "seconds": sum((numbers or {}).get("seconds") or 0.0 for numbers in results.values()),
    }
