"""A stage's inputs: settings written in the recipe, the content of its files, and earlier stages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from trl_rlaif.recipe import SECTIONS, Recipe
from trl_rlaif.recipe.sections import plain
from trl_rlaif.recipe.source import KeyPath

# Keys whose entries are components: a name, or {name: {option: value}}.
_COMPONENTS = ("sampler", "labeler", "transforms", "selectors")
# Settings of judges that do not change their answers: how and where a server is asked (the model's name identifies it),
# and how vLLM runs a judge.
_KNOBS = (
    "base_url", "price", "api_key_env", "concurrency", "timeout", "max_retries",
    "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager",
)  # fmt: skip
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_SPLIT = " x ".join(BATCH)
# These may change when training resumes from a checkpoint, but a finished stage is redone if they change.
_LEARNED_TOO = ("bf16", "fp16", "chat_template_path", "steps_per_generation")
_UNSET = object()


@dataclass(frozen=True)
class Inputs:
    """The inputs of one stage.

    Args:
        settings: Those written in the recipe, by dotted key (``rl.kl_coef``). Defaults are not recorded: if a later
            version adds keys or changes defaults, finished stages are not redone.
        files: By key, the path and a digest of the content. Without a local file, the digest is the path itself. The
            path of a model's folder is also among the settings.
        stages: The fingerprint of each earlier stage that this one depends on.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Equal for equal inputs, regardless of the files' paths."""
        content = [self.settings, {key: file["digest"] for key, file in self.files.items()}, self.stages]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        return asdict(self)

    def changes_since(self, before: Inputs) -> list[str]:
        """The differences from an earlier record, one clause each; empty if the stage need not be redone."""
        found = []
        for key in sorted(self.settings.keys() | before.settings.keys()):
            old, new = (_or_default(inputs.settings, key) for inputs in (before, self))
            if old != new:
                found.append(f"{key} was {_shown(old)} and is {_shown(new)} now")
        for key in sorted(self.files.keys() | before.files.keys()):
            old, new = before.files.get(key), self.files.get(key)
            if key in self.settings and not (old and new and old["path"] == new["path"]):
                continue  # a model's path is among the settings; earlier versions recorded no content
            if (old and old["digest"]) != (new and new["digest"]):
                found.append(_file_change(key, old, new))
        found += [f"{name} is redone" for name in self.stages if before.stages.get(name) != self.stages[name]]
        return found + [f"{name} is not used any more" for name in before.stages if name not in self.stages]


def _file_change(key: str, old: dict[str, str] | None, new: dict[str, str] | None) -> str:
    if old and new and old["path"] == new["path"]:
        return f"the content of {key} has changed ({new['path']})"
    return f"{key} was {old['path'] if old else 'not set'} and is {new['path'] if new else 'not set'} now"


def _or_default(settings: Mapping[str, Any], key: str) -> Any:
    return settings[key] if key in settings else default(key)


def _shown(value: Any) -> str:
    if value is _UNSET:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def default(key: str) -> Any:
    """The default of a key in its typed section; ``_UNSET`` if it has none."""
    from trl_rlaif.memory.settings import class_defaults

    section, *path = key.split(".")
    if path == [_SPLIT]:
        return _product(class_defaults(section).get(name) for name in BATCH)
    value: Any = _defaults(section)
    for name in path:
        value = value.get(name, _UNSET) if isinstance(value, dict) else _UNSET
    return value


@cache
def _defaults(section: str) -> dict[str, Any]:
    fields = SECTIONS[section].model_fields.items()
    values = {name: f.get_default(call_default_factory=True) for name, f in fields if not f.is_required()}
    return {name: plain(value) for name, value in values.items()}


# ---- Settings -------------------------------------------------------------------------------------------


def written(recipe: Recipe) -> dict[str, Any]:
    """The settings written in a recipe, an override or a variant, by dotted key; all for a recipe created in Python."""
    known = {place[:end] for place in recipe.places for end in range(1, len(place) + 1)}
    return dict(flat(_written(recipe.to_dict(), (), known) if known else recipe.to_dict()))


def _written(value: Any, path: KeyPath, known: set[KeyPath]) -> Any:
    if path and path[-1] in _COMPONENTS:
        if isinstance(value, list):
            return [_component(item, (*path, i), known) for i, item in enumerate(value)]
        return _component(value, path, known)
    if isinstance(value, dict):
        return {k: _written(v, (*path, k), known) for k, v in value.items() if (*path, k) in known}
    return value


def _component(value: Any, path: KeyPath, known: set[KeyPath]) -> Any:
    """A component with its written options; only its name if there are none."""
    if not isinstance(value, dict):
        return value
    ((name, options),) = value.items()
    kept = {key: option for key, option in options.items() if (*path, name, key) in known}
    return {name: kept} if kept else name


def flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Items of nested mappings, by dotted key."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, (*path, str(key)))
    else:
        yield ".".join(path), json.loads(json.dumps(value, default=str))


def selected(settings: Mapping[str, Any], keys: Iterable[str], without: Iterable[str] = ()) -> dict[str, Any]:
    """The settings at or below one of the keys, except those in ``without`` and ``_KNOBS`` of judges."""

    def within(key: str, prefixes: Iterable[str]) -> bool:
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)

    keys, without = tuple(keys), tuple(without)
    return {
        key: value
        for key, value in settings.items()
        if within(key, keys) and not within(key, without) and not _is_knob(key)
    }


def _is_knob(key: str) -> bool:
    *above, last = key.split(".")
    return not {last, *above[-1:]}.isdisjoint(_KNOBS) and "judge" in above


def learned(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A training stage's settings that decide its result; others may change when training resumes from a checkpoint.

    Only the product of ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` counts, unless
    ``loss_reduction`` is ``micro_batch``.
    """
    from trl_rlaif.memory.settings import class_defaults
    from trl_rlaif.run_identity import decides_what_is_learned

    own = set(SECTIONS[section].model_fields)
    names = {key: key.split(".")[1] for key in settings if key.startswith(f"{section}.")}
    kept = {
        k: v
        for k, v in settings.items()
        if k not in names or names[k] in own or names[k] in _LEARNED_TOO or decides_what_is_learned(names[k])
    }
    if not set(BATCH) & set(names.values()):
        return kept
    values = [settings.get(f"{section}.{key}", class_defaults(section).get(key)) for key in BATCH]
    split = {f"{section}.{BATCH[0]}": values[0]} if settings.get(f"{section}.loss_reduction") == "micro_batch" else {}
    return kept | split | {f"{section}.{_SPLIT}": _product(values)}


def _product(values: Iterable[int | None]) -> int:
    return math.prod(value or 1 for value in values)


# ---- Files ----------------------------------------------------------------------------------------------


def data_file(path: str) -> dict[str, str]:
    """A data file, identified by its content, so a moved or touched file is the same input.

    Folders and Hub ids are identified only by name; trainers compare the data itself with their checkpoint's.
    """
    return {"path": path, "digest": digest(path) if Path(path).is_file() else path}


def model_files(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Local models and adapters with a digest of their content: a retrained one is a changed input."""
    from trl_rlaif.models.loading import model_revision

    def known(path: Path) -> str:
        if path.is_dir():
            return model_revision(str(path))
        stat = path.stat()
        return _digest_of_model(str(path), stat.st_size, stat.st_mtime_ns)

    paths = {key: Path(path) for key, path in settings.items() if key.endswith(".path") and path}
    return {key: {"path": str(path), "digest": known(path)} for key, path in paths.items() if path.exists()}


@cache
def _digest_of_model(path: str, size: int, modified: int) -> str:
    """``digest`` of a GGUF file, of gigabytes, that all stages depend on: read once while it is the same."""
    return digest(path)


def prompt_file(name: str) -> dict[str, str]:
    """A judge's prompt, identified by its revision."""
    from trl_rlaif.judging.prompt import JudgePrompt
    from trl_rlaif.recipe import prompt_folder

    return {"path": name, "digest": JudgePrompt.load(prompt_folder(name)).revision}


def digest(path: str) -> str:
    """SHA-256 of a file's content."""
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
