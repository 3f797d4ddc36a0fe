"""Resolves ``auto`` for a run: once, on the machine that starts it; machines that resume the run keep the values."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, TypedDict, cast

from pydantic import BaseModel

from trl_rlaif import hardware
from trl_rlaif.errors import UserError
from trl_rlaif.files import unsealed
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.progress import say
from trl_rlaif.recipe import JudgeSection, ModelSection, Recipe, VLLMJudgeSection


class Machine(TypedDict):
    """The machine that started a run, as stored in recipe.yaml.

    Args:
        dtype: The value of ``auto``; ``auto`` itself is the dtype that a model was saved in, as in transformers and in
            runs started by an earlier version.
        matmul_precision: Of float32 products with 16-bit weights: TF32 rounds less than these.
        processor: Its name.
    """

    dtype: str
    matmul_precision: str
    processor: str


_EARLIER: Machine = {"dtype": "auto", "matmul_precision": "highest", "processor": ""}


def machine_of(folder: RunFolder) -> Machine:
    """The machine that started a run, or else this one.

    Raises:
        UserError: The machine in recipe.yaml was changed.
    """
    saved = folder.recipe()
    if saved:
        try:
            found = unsealed(saved.get("machine", _EARLIER))
        except ValueError:
            found = {}
        if found.keys() != _EARLIER.keys():
            raise UserError("recipe.yaml does not say on which machine this run began.", where=str(folder.path),
                            fix="Restore the run's own copy.")  # fmt: skip
        return cast(Machine, found)
    device = hardware.device_type()
    return {
        "dtype": hardware.fastest_dtype(device),
        "matmul_precision": "high" if device == "cuda" else "highest",
        "processor": hardware.processor(),
    }


def settled(recipe: Recipe, machine: Machine) -> Recipe:
    """Resolve ``auto`` in a recipe: the dtypes of the base and judges, and the precision of float32 products."""
    sections = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    changed = {name: _settled(value, machine) for name, value in sections.items() if isinstance(value, BaseModel)}
    return dataclasses.replace(recipe, **changed)


def _settled(value: Any, machine: Machine) -> Any:
    """A section or one of its values, with ``auto`` resolved for it and every judge in it."""
    if isinstance(value, dict):
        return {key: _settled(item, machine) for key, item in value.items()}
    if not isinstance(value, BaseModel):
        return value
    found = {name: _settled(getattr(value, name), machine) for name in type(value).model_fields}
    if isinstance(value, ModelSection | JudgeSection) and value.dtype == "auto":
        found["dtype"] = machine["dtype"]
    if isinstance(value, ModelSection) and value.matmul_precision == "auto":
        half = found["dtype"] in ("bfloat16", "float16")
        found["matmul_precision"] = machine["matmul_precision"] if half else "highest"
    changed = {name: item for name, item in found.items() if item is not getattr(value, name)}
    return value.model_copy(update=changed) if changed else value


def check_machine(recipe: Recipe) -> None:
    """Check, before any computation, that this machine supports the models of a recipe and its variants.

    Raises:
        UserError: bitsandbytes or vLLM is missing, or the device is Apple's MPS.
    """
    for variant in recipe.variants.values():
        check_machine(variant)
    sections = [getattr(recipe, field.name) for field in dataclasses.fields(recipe)]
    if any(_holds(section, _is_quantized) for section in sections) and not _is_installed("bitsandbytes"):
        raise UserError(
            "quantization: nf4 needs the package bitsandbytes.",
            where=str(recipe.source),
            fix="Run: pip install bitsandbytes; or, where it is not built for this system, set quantization: none.",
        )
    if any(_holds(section, _is_in_vllm) for section in sections) and not _is_installed("vllm"):
        raise UserError(
            "A judge with backend: vllm needs the package vllm.",
            where=str(recipe.source),
            fix="Run: pip install 'trl-rlaif[vllm]'; or use a vLLM server with backend: openai.",
        )
    if hardware.device_type() == "mps":
        raise UserError(
            "Apple's MPS has no float64, in which rewards and importance weights are summed.",
            where="device mps",
            fix="Set ACCELERATE_USE_CPU=true to compute on the CPU.",
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_quantized(section: BaseModel) -> bool:
    return getattr(section, "quantization", "none") == "nf4"


def _is_in_vllm(section: BaseModel) -> bool:
    return isinstance(section, VLLMJudgeSection)


def _holds(value: Any, is_such: Callable[[BaseModel], bool]) -> bool:
    """Whether ``is_such`` holds for a section or a section nested in it."""
    if isinstance(value, dict):
        return any(_holds(item, is_such) for item in value.values())
    if not isinstance(value, BaseModel):
        return False
    return is_such(value) or any(_holds(getattr(value, name), is_such) for name in type(value).model_fields)


def say_where(recipe: Recipe, began: Machine) -> None:
    """Print a run's first line, with processor and dtype; and a warning if bfloat16 is emulated.

    Args:
        recipe: With ``auto`` resolved.
    """
    here, dtype = hardware.processor(), recipe.model.dtype
    elsewhere = f", as it was begun on {began['processor']}" if began["processor"] not in ("", here) else ""
    say(f"{here}: weights in {'the type of the model' if dtype == 'auto' else dtype}{elsewhere}.")
    warning = hardware.emulation_warning(f"model.dtype is {dtype}", hardware.device_type())
    if dtype == "bfloat16" and warning:
        say(f"{warning} Set model.dtype to float32, or to auto.")
