"""What ``auto`` means for a run: settled once by the machine that begins it, and kept for those that go on with it."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from pydantic import BaseModel

from trl_rlaif import hardware
from trl_rlaif.errors import UserError
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.progress import say
from trl_rlaif.recipe import JudgeSection, ModelSection, Recipe


def settled(recipe: Recipe, folder: RunFolder) -> Recipe:
    """A recipe in which ``auto`` is settled for a run: of the base and of judges, for dtypes and float32 products.

    TF32 rounds less than 16-bit weights do, and is taken beside them on a GPU; elsewhere float32 is computed as such.
    """
    machine = machine_of(folder)
    # To an earlier version auto was the type that a model was saved in, as it is to transformers.
    dtype = machine["dtype"] if machine else "auto"
    sections = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    changed = {name: _settled(value, dtype) for name, value in sections.items() if isinstance(value, BaseModel)}
    return dataclasses.replace(recipe, **changed)


def machine_of(folder: RunFolder) -> dict[str, str] | None:
    """The machine that began a run, or else this one.

    Returns:
        ``dtype``, what ``auto`` stands for, and ``processor``, its name; None where an earlier version began the run.
    """
    saved = folder.recipe()
    if saved:
        return saved.get("machine")
    return {"dtype": hardware.fastest_dtype(hardware.device_type()), "processor": hardware.processor()}


def _settled(value: Any, dtype: str) -> Any:
    """A section, or what one holds, with its own ``auto`` settled and that of every judge in it."""
    if isinstance(value, dict):
        return {key: _settled(item, dtype) for key, item in value.items()}
    if not isinstance(value, BaseModel):
        return value
    found = {name: _settled(getattr(value, name), dtype) for name in type(value).model_fields}
    if isinstance(value, ModelSection | JudgeSection) and value.dtype == "auto":
        found["dtype"] = dtype
    if isinstance(value, ModelSection) and value.matmul_precision == "auto":
        half = found["dtype"] in ("bfloat16", "float16") and hardware.device_type() == "cuda"
        found["matmul_precision"] = "high" if half else "highest"
    changed = {name: item for name, item in found.items() if item is not getattr(value, name)}
    return value.model_copy(update=changed) if changed else value


def check_machine(recipe: Recipe) -> None:
    """Before anything is computed: that this machine can hold and train what a recipe names.

    Raises:
        UserError: bitsandbytes is missing, or models would be put on Apple's MPS.
    """
    sections = (getattr(recipe, field.name) for field in dataclasses.fields(recipe))
    if any(map(_is_quantized, sections)) and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "quantization: nf4 needs the package bitsandbytes.",
            where=str(recipe.source),
            fix="Run: pip install bitsandbytes; or, where it is not built for this system, set quantization: none.",
        )
    if hardware.device_type() == "mps":
        raise UserError(
            "Apple's MPS has no float64, in which rewards and importance weights are summed.",
            where="device mps",
            fix="Set ACCELERATE_USE_CPU=true, which computes on the processor.",
        )


def _is_quantized(value: Any) -> bool:
    """Whether a section, or a judge that one holds, is in 4 bits."""
    if isinstance(value, dict):
        return any(map(_is_quantized, value.values()))
    if not isinstance(value, BaseModel):
        return False
    inner = (getattr(value, name) for name in type(value).model_fields)
    return getattr(value, "quantization", "none") == "nf4" or any(map(_is_quantized, inner))


def say_where(recipe: Recipe, folder: RunFolder) -> None:
    """A run's first line: on what it computes, and in which type; and a warning where that is emulated."""
    here, began, dtype = hardware.processor(), machine_of(folder), recipe.model.dtype
    elsewhere = f", as it was begun on {began['processor']}" if began and began["processor"] != here else ""
    say(f"{here}: weights in {'the type of the model' if dtype == 'auto' else dtype}{elsewhere}.")
    warning = hardware.emulation_warning(f"model.dtype is {dtype}", hardware.device_type())
    if dtype == "bfloat16" and warning:
        say(f"{warning} Set model.dtype to float32, or to auto.")
