"""Which kernels are used: each on, off, or where it has been measured to pay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

Switch = Literal["auto"] | bool

# By kernel, whether it is on by default on a CPU and on a GPU. On a GPU only where it was measured to pay
# (benchmarks/results/gpu.md) or where a run would not fit without it; benchmarks/cpu_kernels.py measures them on a CPU.
DEFAULTS: dict[str, tuple[bool, bool]] = {
    "packing": (True, True),
    "fused_lora": (True, True),
    "logprob_head": (True, True),
    "cpu_attention": (True, False),
    "cast_weights": (True, True),
    "static_cache": (False, False),
}

_chosen: dict[str, Switch] = {}


@contextmanager
def kernels(switches: Mapping[Any, Switch] | None = None, /, **more: Switch) -> Iterator[None]:
    """Switch kernels on or off in this process while inside; ``auto``, as without a word, asks ``DEFAULTS``.

    Args:
        switches, more: By name: packing, fused_lora, logprob_head, cpu_attention, cast_weights, static_cache.

    Raises:
        ValueError: There is no kernel of that name.
    """
    global _chosen
    before, wanted = _chosen, {**(switches or {}), **more}
    unknown = sorted(set(wanted) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"There is no kernel '{unknown[0]}'; there are {', '.join(DEFAULTS)}.")
    _chosen = before | wanted
    try:
        yield
    finally:
        _chosen = before


def used(kernel: str, device: torch.device | str) -> bool:
    """Whether a kernel is to be used on a device."""
    choice = _chosen.get(kernel, "auto")
    return DEFAULTS[kernel][torch.device(device).type != "cpu"] if choice == "auto" else choice
