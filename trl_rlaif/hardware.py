"""Which dtypes this machine computes fast, and its available memory: resolves ``auto`` settings."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Below this slowdown, bfloat16 is worth its rounding. Observed values are far from it, so a busy moment has no effect.
FAST = 0.7
# (rows, inputs, outputs) of the timed matrix product: like a layer of a small model over a few sequences.
_PRODUCT = (256, 512, 512)
# Memory limits of a container, or of a service and its parent groups (cgroup v2), which free memory does not reflect.
_GROUPS, _GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def device_type() -> str:
    """Device type of models: ``cuda``, ``cpu``, or another type that accelerate finds."""
    from trl_rlaif import distributed

    return str(distributed.join().device).partition(":")[0]


def computes_bfloat16(device: str) -> bool:
    """Whether a device type, such as ``cpu``, computes bfloat16 natively and thus faster than float32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bfloat16_slowdown() < FAST


@cache
def bfloat16_slowdown() -> float:
    """Time of a matrix product in bfloat16, relative to float32, on this processor.

    Measured, in at most a second, since CPU flags do not tell whether torch's build uses them or what limits it
    (``ONEDNN_MAX_CPU_ISA``). Observed: about 0.2 with AMX, and 20 if bfloat16 is emulated.
    """
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, inputs, outputs = _PRODUCT
        a, b = torch.ones(rows, inputs, dtype=dtype), torch.ones(inputs, outputs, dtype=dtype)
        a @ b  # warm-up: creates threads and the kernel
        found = []
        for _ in range(3):
            began = time.perf_counter()
            a @ b
            found.append(time.perf_counter() - began)
        seconds[dtype] = min(found)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def fastest_dtype(device: str) -> str:
    """``bfloat16`` or ``float32``: the dtype of models if a recipe says ``auto``."""
    return "bfloat16" if computes_bfloat16(device) else "float32"


def emulation_warning(what: str, device: str) -> str:
    """A warning that ``what``, set to bfloat16, is slow on this device; empty if it is not."""
    if device not in ("cpu", "cuda") or computes_bfloat16(device):
        return ""
    if device == "cuda":
        return f"Warning: {what}, which this GPU emulates: it is slower than float32."
    return (
        f"Warning: {what}, which this processor emulates: a matrix product takes {bfloat16_slowdown():.0f} times as "
        "long as in float32."
    )


def settle_bf16(args: Any) -> None:
    """Set ``args.bf16`` if it is None, and report if that turns it off; warn if bfloat16 is emulated.

    TRL's configurations turn it on whenever ``fp16`` is off.

    Args:
        args: transformers' TrainingArguments, before their own ``__post_init__``.
    """
    import torch

    accelerator = None if args.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator else "cpu"
    if args.bf16 is None and device in ("cpu", "cuda", "mps"):
        # On a CPU, transformers accepts bf16 only with use_cpu.
        args.bf16 = not args.fp16 and (accelerator is not None or args.use_cpu) and computes_bfloat16(device)
        if not args.bf16 and not args.fp16:
            _say_once("bf16 is off: bfloat16 is slow on this machine, or use_cpu is not set.")
    elif args.bf16:
        _say_once(emulation_warning("bf16 is on", device))


def let_memory_grow() -> None:
    """Let torch extend its GPU memory segments in place, unless the environment configures its allocator.

    KV caches grow token by token, and batches differ in length: in segments of fixed size they leave gaps, which
    ``trl-rlaif memory`` counts as fragmentation. Call it before CUDA is used. Not measured on a GPU. Does nothing where
    driver support is uncertain: on Windows, including WSL.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    supported = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if supported and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # the name that every version reads


def use_one_gpu(args: Any) -> Any:
    """Restrict a process to one GPU, and print how to use the others; returns the arguments.

    transformers would split each batch over all visible GPUs (``nn.DataParallel``), which this library does not
    support, and multiplies the batch size by their number even if it does not split, as with 4-bit weights. TRL 1.16's
    trainers reject that.

    Args:
        args: transformers' TrainingArguments, before the trainer is built.
    """
    if args.n_gpu > 1:
        _say_once(
            f"This process sees {args.n_gpu} GPUs and trains on one. To train on all of them, start it with "
            f"accelerate launch --num_processes {args.n_gpu} (docs/processes.md); CUDA_VISIBLE_DEVICES says which "
            "ones it sees."
        )
        args._n_gpu = 1
    return args


@cache
def _say_once(text: str) -> None:
    from trl_rlaif.progress import say

    if text:
        say(text)


def available_memory(device: str) -> int:
    """Bytes that this process can use on a device type: free memory plus what it already holds."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    import psutil

    usable = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min([usable, *_group_limits()])


def _group_limits() -> Iterator[int]:
    lines = _GROUP.read_text(encoding="utf-8").splitlines() if _GROUP.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in (_GROUPS / own, *(_GROUPS / own).parents):
        limit = folder / "memory.max"
        if folder.is_relative_to(_GROUPS) and limit.exists() and (found := limit.read_text().strip()) != "max":
            yield int(found)


def processor() -> str:
    """The name of the GPU or processor that models run on."""
    if device_type() == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
