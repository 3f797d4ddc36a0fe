"""Run folders of the first version, whose markers hold a fingerprint of all files and settings, including defaults.

Its recipe.yaml holds the fingerprinted settings. If these settings and the current files give the same fingerprint, the
files are unchanged, and the settings can be compared one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_rlaif.pipeline.inputs import Inputs, data_file, digest, flat, prompt_file
from trl_rlaif.pipeline.stage import Stage
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.sections import FORGET_SET, STOPPING_LIMITS, DataSection

_STAGES = ("sft", "sample", "label", "reward", "rl", "evaluate", "report")
_TRACKING = ("track_every", "track_prompts", "stop_on_forgetting")


def inputs_of(stage: Stage, saved: Mapping[str, Any], fingerprint: str, recipe: Recipe, now: Inputs) -> Inputs | None:
    """The inputs of a stage of the first version.

    Args:
        saved: The folder's recipe.yaml.
        fingerprint: The one in the stage's marker.
        recipe: The recipe that resumes the run.
        now: The stage's inputs from this recipe.

    Returns:
        ``now`` with the earlier values of changed settings and files; None if ``saved`` and the files do not give the
        fingerprint.
    """
    if fingerprints(saved).get(stage.name) != fingerprint:
        return None
    old, new = (dict(flat(sections)) for sections in (dict(saved), recipe.to_dict()))
    before, after = (stage.relevant(recipe, settings) for settings in (old, new))
    changed = {key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))}
    kept = {key: value for key, value in now.settings.items() if key not in changed}
    # A key added by a later version has no earlier value, and counts as changed only if the recipe sets it.
    settings = kept | {key: before[key] for key in changed if key in before}
    columns = DataSection.model_validate({"columns": saved["data"].get("columns") or {}})
    of = {f"data.columns of {source}": columns.columns_of(source) for source in stage.columns(recipe)}
    settings = {key: value for key, value in settings.items() if key not in of} | {k: v for k, v in of.items() if v}
    return Inputs(settings, {key: _file(key, old, file) for key, file in now.files.items()}, now.stages)


def _file(key: str, old: Mapping[str, Any], now: dict[str, str]) -> dict[str, str]:
    path = old.get(key)
    if path is None:
        path = old.get("label.prompt", "general") if key == "evaluate.prompt" else now["path"]
    is_prompt = key.endswith(".prompt") or key == "evaluate.harmless"
    return now if path == now["path"] else prompt_file(path) if is_prompt else data_file(path)


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal, except for options that a later version added to a component."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() <= new.keys() and all(_same(value, new[key]) for key, value in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return old == new


def fingerprints(saved: Mapping[str, Any]) -> dict[str, str]:
    """The first version's fingerprints of a resolved recipe's stages."""
    if not isinstance(saved.get("data"), dict) or not {"run", "model"} <= saved.keys():
        return {}
    common = {name: saved[name] for name in ("run", "model", "data")} | {"run": {"seed": saved["run"].get("seed")}}
    files = {key: _identity(value) for key, value in saved["data"].items() if isinstance(value, str)}
    before, found = json.dumps([common, files], sort_keys=True, default=str), {}
    for stage in _STAGES:
        if stage in saved or (stage == "sample" and saved["data"].get("pairs")):
            own = [_settings(saved, stage), [*_files(saved, stage)]]
            text = json.dumps(own, sort_keys=True, default=str)
            before = hashlib.sha256(f"{before}\n{stage}\n{text}".encode()).hexdigest()
            found[stage] = before
    return found


def _settings(saved: Mapping[str, Any], stage: str) -> dict[str, Any]:
    section, evaluate = saved.get(stage) or {}, saved.get("evaluate") or {}
    if stage == "evaluate":
        return {key: value for key, value in section.items() if key not in _TRACKING}
    if stage == "rl":
        section = {key: value for key, value in section.items() if key not in STOPPING_LIMITS}
        if evaluate.get("stop_on_forgetting") is not None:
            ending = {key: evaluate[key] for key in (*_TRACKING, "judge", "prompt", "max_new_tokens")}
            return section | {"evaluate": ending | {"forget": evaluate["sets"][FORGET_SET]}}
    return section


def _files(saved: Mapping[str, Any], stage: str) -> Iterator[str | None]:
    section, evaluate = saved.get(stage) or {}, saved.get("evaluate") or {}
    own = [section.get("data"), section.get("rehearsal"), *(section.get("sets") or {}).values()]
    prompts = [section.get("prompt"), section.get("harmless")]
    prompts += [other.get("prompt") for key in ("compare", "judges") for other in (section.get(key) or {}).values()]
    if stage == "rl" and evaluate.get("stop_on_forgetting") is not None:
        own, prompts = [*own, evaluate["sets"][FORGET_SET]], [evaluate.get("prompt")]
    yield from (prompt_file(name)["digest"] for name in prompts if name)
    yield from (_identity(path) for path in [section.get("calibration"), *own] if path)


def _identity(path: str) -> str | None:
    return digest(path) if Path(path).is_file() else None
