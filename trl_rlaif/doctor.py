"""Checks what a run needs from this machine, with advice if a run would be slow or fail."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from trl_rlaif import __version__, hardware
from trl_rlaif.errors import TrlRlaifError

_GIB = 1 << 30
# Bytes: the weights of a 7B model in bfloat16, which the Hub's cache must hold once.
_ROOM = 16 * _GIB
# A public model to ask the Hub about, and the timeout.
_ANY_MODEL, _SECONDS = "openai-community/gpt2", 5.0


class Finding(NamedTuple):
    """A finding about one aspect of the machine.

    Args:
        subject: The aspect.
        found: What was found.
        advice: What to change; empty if nothing is wrong.
    """

    subject: str
    found: str
    advice: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Check packages, plugins, the processor or GPU, memory, disks and the Hub, one after the other.

    Args:
        folder: Where runs would be written.
    """
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield _packages()
    yield _plugins()
    yield from _devices()
    yield _quantization()
    for name, place in (("disk for runs", folder), ("disk for models", _hub_cache())):
        yield _disk(name, place)
    yield _hub()


def report(findings: Iterator[Finding]) -> Iterator[str]:
    """A line for each finding, followed by one with the advice, if any."""
    for subject, found, advice in findings:
        yield f"{'!' if advice else ' '} {subject:<16}{found}"
        if advice:
            yield f"{'':<18}{advice}"


def _packages() -> Finding:
    from trl_rlaif.pipeline.runner import PACKAGES, installed_version

    found = {name: installed_version(name) for name in PACKAGES}
    text = ", ".join([f"trl-rlaif {__version__}", *(f"{name} {number or 'missing'}" for name, number in found.items())])
    advice = ""
    try:
        from trl_rlaif.compat.trl_version import check_trl

        check_trl()
    except TrlRlaifError as error:
        advice = str(error)
    return Finding("packages", text, advice)


def _plugins() -> Finding:
    from trl_rlaif.errors import Problem
    from trl_rlaif.plugins import build_plugins, plugin_points

    broken: list[Problem] = []
    count = len([*build_plugins(plugin_points(), broken).registry])
    return Finding("plugins", f"{count} components", " ".join(map(str, broken)))


def _devices() -> Iterator[Finding]:
    device = hardware.device_type()
    yield Finding("computes on", hardware.processor(), "" if device != "cpu" else _why_no_gpu())
    dtype = hardware.fastest_dtype(device)
    said = "computed fast" if dtype == "bfloat16" else "emulated or slow: models are held in float32"
    yield Finding("bfloat16", said)
    yield Finding("memory", f"{hardware.available_memory(device) / _GIB:.1f} GiB that can be used now")


def _why_no_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return "There is a GPU, and ACCELERATE_USE_CPU or CUDA_VISIBLE_DEVICES keeps it out."
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return "There is an NVIDIA driver, and this torch was built for processors alone: install a CUDA build of it."
    return "Small models alone are fast enough here: see the recipe quickstart, or ask a judge on a server."


def _quantization() -> Finding:
    if find_spec("bitsandbytes") is None:
        return Finding(
            "4-bit weights", "no bitsandbytes", "pip install bitsandbytes, for recipes with quantization: nf4."
        )
    if hardware.device_type() != "cuda":
        return Finding("4-bit weights", "possible, and slow without a GPU")
    return Finding("4-bit weights", f"bitsandbytes {version('bitsandbytes')}")


def _disk(name: str, place: Path) -> Finding:
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free
    advice = "" if os.access(there, os.W_OK) else "It cannot be written to."
    if free < _ROOM:
        advice = advice or "That is less than the weights of a 7B model take."
    return Finding(name, f"{free / _GIB:.0f} GiB free in {place}", advice)


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _hub() -> Finding:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("the Hub", "not asked: HF_HUB_OFFLINE is set")
    token = "with a token" if get_token() else "without a token"
    try:
        HfApi().model_info(_ANY_MODEL, timeout=_SECONDS)
    except Exception as error:  # networks fail in many ways
        what = f"cannot be reached ({type(error).__name__})"
        return Finding("the Hub", what, "Name models and data by a path, or set HF_ENDPOINT or a proxy.")
    return Finding("the Hub", f"reached, {token}", "" if get_token() else "`hf auth login`, for gated models.")
