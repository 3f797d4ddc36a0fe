"""`trl-rlaif` in bfloat16 on a CPU without native support, at about a third of the float32 speed.

    python benchmarks/rounded_bfloat16.py run quickstart --output runs/bfloat16

Matrix products of bfloat16 numbers are computed in float32 and rounded once, like AMX does; `auto` selects bfloat16, as
on such a CPU. For comparing the results of a run in either dtype; its times are not meaningful.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_rlaif import hardware
from trl_rlaif.cli import main

_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")}


class RoundedOnce(TorchDispatchMode):
    """Products of bfloat16 numbers in float32, and their results in bfloat16."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``op``."""
        if op in _PRODUCTS and any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args):
            wide = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
            return op(*wide, **(kwargs or {})).to(torch.bfloat16)
        return op(*args, **(kwargs or {}))


if __name__ == "__main__":
    hardware.bfloat16_slowdown = lambda: 0.0
    with RoundedOnce():
        main()
