"""CPU tensors that pretend to be on a GPU, to find operations that would mix devices there or make the CPU wait.

The internals of an operation (such as the checks of ``multinomial``) are not seen, nor are copies to the GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
ROOT = Path(__file__).parents[2]
# These accept an index or a source on the CPU for tensors on a GPU.
_TAKES_BOTH = {"index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy", "_unsafe_index", "copy"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
_MAKE = torch.tensor  # creates its result without dispatching
_phase = "outside"
mixed: Counter[tuple[str, str, str]] = Counter()
waits: Counter[tuple[str, str, str]] = Counter()
calls: Counter[str] = Counter({"outside": 1})
tokens: Counter[str] = Counter()


class Pretended(torch.Tensor):
    """A CPU tensor that reports another device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        kept = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **kept)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        _waited("tolist")
        return self.inner.tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, **_: Any) -> Pretended:
        return Pretended(_MAKE(data, dtype=dtype or self.dtype))

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a CPU tensor, which is how a saved GPU tensor is loaded."""
        _waited("save")
        return self.inner.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        copied = Pretended(self.inner.detach().clone())
        if type(self) is nn.Parameter or isinstance(self, nn.Parameter):
            return nn.Parameter(copied, requires_grad=self.requires_grad)
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """While active, tensors created on ``DEVICE`` are ``Pretended``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _waited(name: str) -> None:
    waits[_phase, name, _line()] += 1


def _line() -> str:
    """The innermost line of this project on the call stack, tests excluded."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "tests" not in path.relative_to(ROOT).parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "elsewhere"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = func.overloadpacket.__name__, [x for x in tree_flatten((args, kwargs))[0] if _is_tensor(x)]
    pretended = [x for x in tensors if isinstance(x, Pretended)]
    there = bool(pretended)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "pretend"
        kwargs = {**kwargs, "device": "cpu"}
    if pretended and name not in _TAKES_BOTH and any(not isinstance(x, Pretended) and x.dim() for x in tensors):
        mixed[_phase, name, _line()] += 1
    by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
    to_cpu = name == "copy_" and not isinstance(args[0], Pretended) or name == "_to_copy" and not there
    if pretended and (name in _WAITS or by_mask or to_cpu):
        _waited(name)
    if name == "_fused_sdp_choice":
        return 0
    there = isinstance(args[0], Pretended) if name == "copy_" else there and name != "_local_scalar_dense"
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name.endswith("_") and not name.startswith("_") and _is_tensor(args[0]):
        return args[0]
    if not there:
        return found
    return tree_map(lambda x: Pretended(x) if _is_tensor(x) and not isinstance(x, Pretended) else x, found)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def move(model: nn.Module) -> nn.Module:
    """Move a model's parameters and buffers to ``DEVICE``; shared parameters stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and not isinstance(p.data, Pretended):
                if id(p) not in moved:
                    moved[id(p)] = nn.Parameter(Pretended(p.data), requires_grad=p.requires_grad)
                module._parameters[name] = moved[id(p)]
        for name, b in list(module._buffers.items()):
            if b is not None and not isinstance(b, Pretended):
                module._buffers[name] = Pretended(b)
    return model


def _tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    found = _MAKE(data, *args, **kwargs)
    return Pretended(found) if device is not None and torch.device(device).type == "pretend" else found


@contextmanager
def pretending() -> Iterator[None]:
    """Make ``DEVICE`` the device of all trainers. Use it only once, in a separate process."""
    from accelerate import Accelerator
    from transformers import GenerationMixin, TrainingArguments

    generate = GenerationMixin.generate

    def counted(self: Any, **kwargs: Any) -> Any:
        with phase(name := f"{_phase}, decoding"):
            found = generate(self, **kwargs)
            sequences = found if isinstance(found, torch.Tensor) else found.sequences
            tokens[name] += sequences.shape[1] - kwargs["input_ids"].shape[1]
        return found

    GenerationMixin.generate = counted
    torch.tensor = _tensor
    type(torch.pretend).get_amp_supported_dtype = lambda self: [torch.bfloat16, torch.float16]
    Accelerator.device = property(lambda self: DEVICE)
    TrainingArguments.device = property(lambda self: (self._setup_devices, DEVICE)[1])
    with Pretending():
        yield


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Record everything inside under ``name``."""
    global _phase
    before, _phase = _phase, name
    calls[name] += 1
    try:
        yield
    finally:
        _phase = before


def watch(owner: Any, method: str, name: str) -> None:
    """Make each call of a method a phase."""
    function = getattr(owner, method)

    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with phase(name):
            return function(*args, **kwargs)

    setattr(owner, method, watched)


def seen() -> dict[str, dict[str, Any]]:
    """For every phase: calls, decoded tokens, and how often each operation mixed devices or waited, by line."""
    found: dict[str, dict[str, Any]] = {
        name: {"calls": count, "tokens": tokens[name], "mixed": {}, "waits": {}} for name, count in calls.items()
    }
    for kind, counter in (("mixed", mixed), ("waits", waits)):
        for (name, operation, line), count in counter.most_common():
            found[name][kind][f"{operation} at {line}"] = count
    return found
