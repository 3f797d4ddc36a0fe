"""Runs a recipe's stages in order into a run's folder, whole or from where it was."""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trl_rlaif import __version__, distributed
from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.artifacts import RunFolder, write_atomically
from trl_rlaif.plugins import Plugins
from trl_rlaif.progress import Publisher, publishing, say
from trl_rlaif.recipe import STAGES, Recipe, prompt_folder
from trl_rlaif.recipe.base_model import check_base
from trl_rlaif.recipe.sections import FORGET_SET, STOPPING_LIMITS

PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "torch", "bitsandbytes")

# Sections that every stage depends on.
_COMMON = ("run", "model", "data")
# What the section evaluate says of measurements while rl runs; evaluate itself does not depend on it.
_TRACKING = ("track_every", "track_prompts", "stop_on_forgetting")


def active_stages(recipe: Recipe) -> list[str]:
    """The stages that a recipe runs, in order. Pairs from data take the place of ``sample``."""
    return [
        stage for stage in STAGES if getattr(recipe, stage) is not None or (stage == "sample" and recipe.data.pairs)
    ]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """For each stage what its artefact depends on: its section, the stages before it, and the input files."""
    plain = recipe.to_dict()
    common = {name: plain[name] for name in _COMMON}
    common["run"] = {"seed": recipe.run.seed}  # a new name changes nothing
    inputs = {k: _identity(v) for k, v in plain["data"].items() if isinstance(v, str)}
    before, result = json.dumps([common, inputs], sort_keys=True, default=str), {}
    for stage in active_stages(recipe):
        own = json.dumps([_settings_of(plain, stage), _files_of(recipe, stage)], sort_keys=True, default=str)
        before = hashlib.sha256(f"{before}\n{stage}\n{own}".encode()).hexdigest()
        result[stage] = before
    return result


def _settings_of(plain: dict[str, Any], stage: str) -> dict[str, Any]:
    """The settings that a stage's artefact depends on; for rl also those of ``evaluate`` that can end it."""
    section, evaluate = plain.get(stage, {}), plain.get("evaluate") or {}
    if stage == "evaluate":
        return {key: value for key, value in section.items() if key not in _TRACKING}
    if stage == "rl":  # the message that stops a run asks for other limits: they must not make a new run of it
        section = {key: value for key, value in section.items() if key not in STOPPING_LIMITS}
    if stage == "rl" and evaluate.get("stop_on_forgetting") is not None:
        ending = {key: evaluate[key] for key in (*_TRACKING, "judge", "prompt", "max_new_tokens")}
        return section | {"evaluate": ending | {"forget": evaluate["sets"][FORGET_SET]}}
    return section


def _files_of(recipe: Recipe, stage: str) -> list[str | None]:
    """What a stage's section reads beside the data: prompts, pairs to calibrate on, data of its own."""
    from trl_rlaif.judging.prompt import JudgePrompt

    section, evaluate = getattr(recipe, stage), recipe.evaluate
    if section is None:
        return []
    own = [getattr(section, name, None) for name in ("data", "rehearsal")] + [*getattr(section, "sets", {}).values()]
    prompts = [getattr(section, name, None) for name in ("prompt", "harmless")]
    prompts += [c.prompt for name in ("compare", "judges") for c in getattr(section, name, {}).values()]
    if stage == "rl" and evaluate is not None and evaluate.stop_on_forgetting is not None:
        own, prompts = [*own, evaluate.sets[FORGET_SET]], [evaluate.prompt]
    revisions = [JudgePrompt.load(prompt_folder(name)).revision for name in prompts if name]
    calibration = getattr(section, "calibration", None)
    return [*revisions, *(_identity(path) for path in [calibration, *own] if path)]


def _identity(path: str) -> str | None:
    """A data file's content: a touched or moved file is the same input, a changed one is not."""
    file = Path(path)
    if not file.is_file():
        return None
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run_recipe(
    recipe: Recipe,
    plugins: Plugins,
    output: str | Path,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    command: str = "",
    shard: str | None = None,
    donors: Sequence[RunFolder] = (),
) -> RunFolder:
    """Run a recipe.

    Args:
        recipe: Checked.
        plugins: Whose components it names.
        output: The run's folder.
        resume: Go on in a folder that is used already, and skip what is complete.
        only: Run these stages alone; what they stand on must be complete.
        command: How the run was started, for the report.
        shard: ``i/n`` labels this machine's share of the pairs, and ends there. The labels.jsonl of all
            machines, joined, is what one machine would have made.
        donors: Other runs. What one of them completed with the same settings, on the same inputs, is copied from it.

    Raises:
        UserError: The folder is used already, is not writable, or lacks what a stage stands on; or the base cannot do
            what the recipe asks of it.
    """
    if shard is not None:
        _check_shard(recipe, shard)
    check_base(recipe)  # before anything is paid for
    folder = RunFolder(output)
    with folder.locked():
        prints = fingerprints(recipe)
        _check_only(folder, prints, only)
        prepare(recipe, folder, command, used=resume or bool(only))
        with publishing(folder.state, prints) as publisher:
            _run_stages(recipe, plugins, folder, prints, resume, only, shard, publisher, donors)
        if shard is None:
            _say_signs(folder)
    return folder


def _say_signs(folder: RunFolder) -> None:
    """Say at the run's end why it may have learned nothing, as the report does in its first lines."""
    from trl_rlaif.report.no_learning import signs_of_no_learning
    from trl_rlaif.report.run_data import read_run

    signs = signs_of_no_learning(read_run(folder.path))
    if signs:
        say("\n- ".join(["This run may have learned nothing:", *signs]))


def prepare(recipe: Recipe, folder: RunFolder, command: str, *, used: bool) -> None:
    """Write recipe.yaml, and quiet the libraries.

    Raises:
        UserError: The folder is used already, and ``used`` does not allow that.
    """
    if folder.is_used and not used:
        raise UserError(
            "A run lives in this folder already.",
            where=str(folder.path),
            fix="Add --resume to go on with it, or name another folder with --output.",
        )
    _write_recipe(recipe, folder, command)
    _quiet_libraries()


def _check_shard(recipe: Recipe, shard: str) -> None:
    from trl_rlaif.pipeline.context import Shard

    Shard.parse(shard)
    if recipe.label is None:
        raise UserError("--shard divides the labeling, and this recipe has no 'label'.")


def _check_only(folder: RunFolder, prints: dict[str, str], only: Sequence[str]) -> None:
    unknown = [stage for stage in only if stage not in prints]
    if unknown:
        raise UserError(f"This recipe has no stage '{unknown[0]}'.", fix=f"It has: {', '.join(prints)}.")
    for stage in only:
        for earlier in list(prints)[: list(prints).index(stage)]:
            if earlier not in only and not folder.is_complete(earlier, prints[earlier]):
                raise UserError(
                    f"The stage '{stage}' stands on '{earlier}', which is not complete in {folder.path} "
                    "with these settings.",
                    fix=f"Run it first: --only {earlier},{stage}",
                )


def _run_stages(
    recipe: Recipe,
    plugins: Plugins,
    folder: RunFolder,
    prints: dict[str, str],
    resume: bool,
    only: Sequence[str],
    shard: str | None,
    publisher: Publisher,
    donors: Sequence[RunFolder],
) -> None:
    from transformers import set_seed

    from trl_rlaif.models.kernels import kernels
    from trl_rlaif.pipeline.context import Context, Shard

    context = Context(recipe, folder, plugins, Shard.parse(shard) if shard is not None else None)
    for stage, fingerprint in prints.items():
        if only and stage not in only:
            continue
        # The report costs seconds, and what it shows may have changed.
        if folder.is_complete(stage, fingerprint) and resume and stage != "report":
            say(f"{stage}: complete already")
            if shard is not None and stage == "label":
                return
            continue
        donor = next((run for run in donors if stage != "report" and run.is_complete(stage, fingerprint)), None)
        if donor is not None:
            folder.adopt(stage, fingerprint, donor)
            say(f"{stage}: the same as that of {donor.path.name}")
            continue
        folder.begin(stage, fingerprint)
        distributed.wait()  # until it is clear what the stage finds
        publisher.begin(stage)
        started = time.monotonic()
        # New adapters are drawn before any trainer sets its seed: a resumed run must draw the same.
        set_seed(recipe.run.seed)
        with kernels(recipe.run.kernels):
            numbers = importlib.import_module(f"trl_rlaif.pipeline.stages.{stage}").run(context)
        folder.add_results(stage, numbers)
        if shard is not None and stage == "label":
            say(f"label: share {shard} done. {summary(stage, numbers)}")
            say(f"Join the machines' labels.jsonl into one, and run without --shard: {folder / 'labels.jsonl'}")
            return
        folder.complete(stage, fingerprint)
        gc.collect()  # trainers are cycles: without this a stage's model would live into the next one
        say(f"{stage}: done in {time.monotonic() - started:.0f} s. {summary(stage, numbers)}".rstrip())


def summary(stage: str, numbers: dict[str, Any]) -> str:
    """What a stage's line says of its numbers."""
    if stage == "sample":
        dropped = ", ".join(f"{n} {reason}" for reason, n in numbers["dropped"].items())
        ties = f", {numbers['ties']} of them ties" if numbers.get("ties") else ""
        return f"{numbers['pairs']} pairs{ties}" + (f" (dropped: {dropped})" if dropped else "")
    if stage == "label":
        bias = numbers["position_bias"]
        return (
            f"{numbers['labeled']} of {numbers['pairs']} pairs"
            + _skipped(numbers)
            + (f", {numbers['made']} of them new" if numbers["made"] < numbers["labeled"] else "")
            + (f", position bias {bias['rate']:.0%}" if bias else "")
            + (f", {numbers['agreement']['rate']:.0%} as people chose" if numbers["agreement"] else "")
        )
    if stage == "reward" and numbers.get("accuracy") is not None:
        low, high = numbers["accuracy_interval"]
        return f"accuracy {numbers['accuracy']:.0%} on held-out pairs ({low:.0%} to {high:.0%}){_skipped(numbers)}"
    if stage == "rl" and "pairs" in numbers:
        return f"{numbers['pairs']} pairs{_skipped(numbers)}"
    if stage == "rl" and "score_first" in numbers:
        kl = f", KL {numbers['kl_last']:.2f}" if "kl_last" in numbers else ""  # GRPO with kl_coef: 0 measures none
        return f"score {numbers['score_first']:+.3f} -> {numbers['score_last']:+.3f}{kl}"
    if stage == "evaluate":
        return "; ".join(
            f"{name}: wins {s['win_rate']:.0%} ({s['interval'][0]:.0%} to {s['interval'][1]:.0%}){_agreeing(s)}"
            for name, s in numbers["sets"].items()
            if "win_rate" in s
        )
    if stage == "compare":
        return "; ".join(f"{name}: {_ranking(s['overall'])}" for name, s in numbers["sets"].items())
    return ""


def _skipped(numbers: dict[str, Any]) -> str:
    skipped = ", ".join(f"{n} {reason}" for reason, n in (numbers.get("skipped") or {}).items())
    return f" (skipped: {skipped})" if skipped else ""


def _ranking(overall: dict[str, dict[str, Any] | None]) -> str:
    """The contestants of a comparison, best first, with their win rates over all others."""
    judged = {name: numbers["win_rate"] for name, numbers in overall.items() if numbers}
    return ", ".join(f"{name} {judged[name]:.0%}" for name in sorted(judged, key=judged.get, reverse=True))


def _agreeing(numbers: dict[str, Any]) -> str:
    """How often all judges of a set agree, where there are several."""
    among = (numbers.get("judge_agreement") or {}).get("all")
    return f", judges agree in {among['rate']:.0%}" if among else ""


def _write_recipe(recipe: Recipe, folder: RunFolder, command: str) -> None:
    versions = {"trl-rlaif": __version__} | {name: version(name) for name in PACKAGES}
    content = recipe.to_dict() | {"versions": versions, "command": command}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_atomically(folder / "recipe.yaml", text)


def _quiet_libraries() -> None:
    """Leave the terminal to the progress bars: what these libraries print of their own work is no news."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
