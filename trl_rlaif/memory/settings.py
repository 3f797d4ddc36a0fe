"""Effective settings of a stage: the recipe's keys over the defaults of the stage and the configuration class."""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from typing import Any

from trl_rlaif.pipeline.stages import STAGES
from trl_rlaif.recipe import Recipe
from trl_rlaif.recipe.trl_fields import CONFIG_CLASSES


@cache
def class_defaults(stage: str) -> dict[str, Any]:
    """The defaults of the configuration class of ``sft``, ``reward`` or ``rl``."""
    module, name = CONFIG_CLASSES[stage]
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    return {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}


def setting(recipe: Recipe, stage: str, key: str) -> Any:
    """The value of a key of ``sft``, ``reward`` or ``rl``; None if it is not set."""
    section = getattr(recipe, stage)
    if key in type(section).model_fields:
        return getattr(section, key)
    if key in section.config:
        return section.config[key]
    if key == "bf16":  # as in Context.trainer_arguments
        return recipe.model.dtype in ("auto", "bfloat16") or recipe.model.quantization == "nf4"
    if key == "gradient_checkpointing":  # as in pipeline.checkpointing, if memory is short
        return True
    return STAGES[stage].defaults.get(key, class_defaults(stage).get(key))


def with_settings(recipe: Recipe, changes: dict[tuple[str, str], Any]) -> Recipe:
    """A recipe with changed values, unvalidated: only for plans.

    Args:
        changes: Values by (section, key).
    """
    sections: dict[str, Any] = {}
    for (name, key), value in changes.items():
        section = sections.get(name) or getattr(recipe, name)
        if key in type(section).model_fields:
            sections[name] = section.model_copy(update={key: value})
        else:
            sections[name] = section.model_copy(update={"config": {**section.config, key: value}})
    return dataclasses.replace(recipe, **sections)


def rl_batch(recipe: Recipe) -> int:
    """Responses per update on one device."""
    rows, steps = (setting(recipe, "rl", key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return rows * (steps or 1)


def rl_rows(recipe: Recipe) -> int:
    """Responses per forward and backward pass: a micro-batch, or a minibatch if that is smaller."""
    rows, parts = (setting(recipe, "rl", key) for key in ("per_device_train_batch_size", "num_mini_batches"))
    return max(1, min(rows, rl_batch(recipe) // (parts or 1)))
