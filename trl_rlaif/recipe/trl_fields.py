"""The keys of a section that are fields of a TRL configuration: their names, types and converted values."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Strict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.compat.trl_version import check_trl
from trl_rlaif.recipe.checking import unknown_key, wrong_value
from trl_rlaif.recipe.formatting import did_you_mean, how_to_mend
from trl_rlaif.recipe.hint_codes import coded, decoded
from trl_rlaif.recipe.ranges import out_of_range
from trl_rlaif.recipe.sections import SECTIONS, Number
from trl_rlaif.recipe.source import Source
from trl_rlaif.remembered import remembered

CONFIG_CLASSES = {
    "sft": ("trl", "SFTConfig"),
    "judge": ("transformers", "TrainingArguments"),
    "reward": ("trl", "RewardConfig"),
    "rl": ("trl_rlaif.rl.ppo.config", "PPOConfig"),
}

_FOLDER = "the run's folder is chosen with --output"
_SEED = "set run.seed"
_MODEL = "the model section says which model is loaded, and how"
_COUNTED = "it follows from per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches"
_SET_BY_US = {
    "output_dir": _FOLDER,
    "logging_dir": _FOLDER,
    "seed": _SEED,
    "data_seed": _SEED,
    **dict.fromkeys(
        ("reasoning", "reasoning_tags", "chat_template_kwargs"), "the section model says it for every stage"
    ),
    "length_column_name": "each stage knows the lengths of its rows",
    "resume_from_checkpoint": "a run continues with --resume",
    "hub_token": "`hf auth login` or the variable HF_TOKEN gives it",
    **dict.fromkeys(
        ("hub_strategy", "hub_always_push", "hub_revision"), "with push_to_hub, a model is pushed once the run ends"
    ),
    "model_init_kwargs": _MODEL,
    "sft_model_path": _MODEL,
    "reward_model_path": "the reward section trains the reward model",
    "reward_weights": "rl.rewards takes them, as in [{reward: 1.0}, {direct: 0.5}]",
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ddp_backend", "local_rank"),
        "accelerate launch --config_file says how processes share the work",
    ),
    **dict.fromkeys(
        ("world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size",
         "local_mini_batch_size", "mini_batch_size"), _COUNTED,
    ),
}  # fmt: skip

_NOTHING_HELD_OUT = "reward.eval_fraction and the section evaluate hold out data; the trainers are given none"
# Fields with only one supported value: the value, and the reason.
_ONLY: dict[str, tuple[Any, str]] = {
    "eval_strategy": ("no", _NOTHING_HELD_OUT),
    "eval_on_start": (False, _NOTHING_HELD_OUT),
    "load_best_model_at_end": (False, _NOTHING_HELD_OUT),
}
_MEASURED = "judge.evaluations and judge.patience say how often it is measured and saved, and when it ends"
_STOPS = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
# Values that a section does not support, and the reason.
_NOT_IN: dict[tuple[str, str], tuple[Any, str]] = {
    **dict.fromkeys((("sft", "save_strategy"), ("reward", "save_strategy"), ("rl", "save_strategy")),
                    ("best", _NOTHING_HELD_OUT)),
    ("rl", "train_sampling_strategy"): ("group_by_length", "its rows have no length to group by"),
    ("rl", "remove_unused_columns"): (True, "rewards are given the columns of the prompts"),
    ("sft", "push_to_hub"): (True, "rl.push_to_hub pushes the policy, which continues from it"),
    ("judge", "remove_unused_columns"): (True, "its rows are questions"),
}  # fmt: skip


def own_keys(section: str) -> list[str]:
    """The keys of a section that are not configuration fields."""
    return [name for name in SECTIONS[section].model_fields if name != "config"]


def is_refused(section: str, key: str) -> bool:
    """Whether a field of a section's configuration cannot be set to any value."""
    return key in _SET_BY_US or (section == "judge" and key in _STOPS)


def take_config(section: str, keys: dict[Any, Any], source: Source) -> None:
    """Move the configuration's fields among the section's keys into one dict at ``keys["config"]``, in place.

    Invalid ones are reported.
    """
    own = own_keys(section)
    others = {key: keys.pop(key) for key in list(keys) if key not in own}
    keys["config"] = {}
    if not others:
        return
    algorithm = keys.get("algorithm") if section == "rl" else None
    hints = _known_hints(section, algorithm)
    for key, value in others.items():
        path, owner = (section, key), f"section '{section}'"
        if key in _SET_BY_US and (key in hints or key == "logging_dir"):
            source.report(path, f"'{key}' cannot be set in {owner}.", f"Remove it: {_SET_BY_US[key]}.")
        elif is_refused(section, key):
            source.report(path, f"'{key}' cannot be set in {owner}.", f"Remove it: {_MEASURED}.")
        elif key not in hints:
            fix = did_you_mean(str(key), [*own, *hints])
            classes = " and ".join(name for _, name in _classes(section, algorithm))
            fix = fix or f"Known keys: {', '.join(own)}, and the fields of {classes}."
            source.report(path, unknown_key(str(key), owner), fix)
        else:
            try:
                keys["config"][key] = convert(hints[key], value)
            except ValidationError:
                fix = how_to_mend(strict_hint(hints[key]), value)
                source.report(path, wrong_value(key, owner, value), fix)
                continue
            fix = _refused(section, key, keys["config"][key])
            if fix:
                source.report(path, wrong_value(key, owner, value), fix)


def _refused(section: str, key: str, value: Any) -> str:
    """The fix for a value of the right type that a field does not accept; empty if it does."""
    if key in _ONLY and value != _ONLY[key][0]:
        return f"Leave it out: {_ONLY[key][1]}."
    if (section, key) in _NOT_IN and value == _NOT_IN[section, key][0]:
        return f"Leave it out: {_NOT_IN[section, key][1]}."
    allowed = out_of_range(key, value)
    return "" if allowed is None else f"It must be {allowed}."


def _known_hints(section: str, algorithm: Any) -> dict[str, Any]:
    """``config_hints``, cached for the installed libraries: importing TRL takes seconds."""

    def found() -> dict[str, Any]:
        return {key: coded(hint) for key, hint in config_hints(section, algorithm).items()}

    question = ["fields", section, algorithm if isinstance(algorithm, str) else None]
    return {key: decoded(code) for key, code in remembered(question, found).items()}


def config_hints(section: str, algorithm: Any = None) -> dict[str, Any]:
    """The fields of a section's configuration with their types; Any if a type cannot be resolved.

    Args:
        section: A section with a configuration.
        algorithm: ``rl.algorithm``; one that TRL trains adds the fields of its configuration.
    """
    check_trl()
    found: dict[str, Any] = {}
    for module, name in _classes(section, algorithm):
        config = getattr(importlib.import_module(module), name)
        try:
            hints = get_type_hints(config)
        except (NameError, TypeError, AttributeError):
            hints = {}
        found = {f.name: _hint_of(f, hints.get(f.name, Any)) for f in dataclasses.fields(config) if f.init} | found
    return found


def _hint_of(field: dataclasses.Field, hint: Any) -> Any:
    """A field's type; for text with listed choices, a Literal of these."""
    choices = field.metadata.get("choices")
    if not choices or hint not in (str, str | None):
        return hint
    listed = Literal[tuple(choices)]  # type: ignore[valid-type]
    return listed if hint is str else listed | None


def _classes(section: str, algorithm: Any) -> list[tuple[str, str]]:
    known = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    return [CONFIG_CLASSES[section], *([known.config] if known and known.config else [])]


def convert(hint: Any, value: Any) -> Any:
    """Convert a value to the type of a field, still as plain data.

    Raises:
        pydantic.ValidationError: The value is of another type.
    """
    try:
        adapter = TypeAdapter(strict_hint(hint))
    except (PydanticUserError, TypeError):
        return value
    return adapter.validate_python(value)


def strict_hint(hint: Any) -> Any:
    """The type without silent conversions, for plain data only; Any for types that YAML cannot represent."""
    if hint in (int, bool, str):
        return Annotated[hint, Strict()]
    if hint is float:
        return Annotated[Number, Strict()]
    if hint in (None, type(None), dict, list) or get_origin(hint) is Literal:
        return hint
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = tuple(member.value for member in hint)
        literal = Literal[values]  # type: ignore[valid-type]
        return Annotated[literal, BeforeValidator(_no)] if "no" in values else literal
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        if any(isinstance(arg, type) and issubclass(arg, enum.Enum) for arg in args):
            # `SchedulerType | str` means an enum's value. Any other text would fail when training starts.
            args = tuple(arg for arg in args if arg is not str)
        if any((get_origin(arg) or arg) is dict for arg in args):
            # `dict | str` means JSON on a command line.
            args = tuple(arg for arg in args if arg is not str)
        return Union[tuple(strict_hint(arg) for arg in args)]  # noqa: UP007 - the members are computed
    if get_origin(hint) in (list, dict):
        return get_origin(hint)[tuple(strict_hint(arg) for arg in args)]
    return Any


def _no(value: Any) -> Any:
    """Convert false back to ``no``: YAML 1.1 reads ``save_strategy: no`` as false."""
    return "no" if value is False else value
