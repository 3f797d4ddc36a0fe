"""Trials: whether two ways of computing a model's results agree, compared where rounding cannot hide a difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from trl_rlaif.models.shared_model import active_adapter

_BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32, torch.float64: 64}


@contextmanager
def trial(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, forward passes are in float32 and eval mode, without adapters, autocast and gradients.

    In bfloat16, rounding alone makes differences as large as those that a wrong mask makes on a few tokens. A float32
    copy of the model would not fit beside it, so each module's weights become float32 only while it is called, and
    4-bit layers compute in float32 from the weights as they are.

    Args:
        model: Of transformers, plain or PEFT. Afterwards it is what it was, to the last bit.
        dtype: float32 or float64. Some models' float32 rounding moves a log-probability by more than 1e-3; 4-bit layers
            compute in float32 at best.
    """
    modes = {module: module.training for module in model.modules()}
    precision, device = torch.get_float32_matmul_precision(), next(model.parameters()).device.type
    with ExitStack() as undo, torch.no_grad(), torch.autocast(device, enabled=False), active_adapter(model, None):
        for module in modes:
            _compute_in(dtype, module, undo)
        torch.set_float32_matmul_precision("highest")
        model.eval()
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for module, training in modes.items():
                module.training = training


def _compute_in(dtype: torch.dtype, module: nn.Module, undo: ExitStack) -> None:
    if isinstance(module, nn.Embedding):  # a large table of which a few rows are read
        undo.callback(module.register_forward_hook(lambda _module, _args, rows: _raised(rows, dtype)).remove)
        return
    if getattr(module, "compute_dtype", None) is not None:  # of bitsandbytes
        undo.callback(setattr, module, "compute_dtype", module.compute_dtype)
        module.compute_dtype = torch.float32
    parameters = [p for p in module._parameters.values() if p is not None and _is_lower(p, dtype)]
    if not parameters:
        return
    held: list[tuple[nn.Parameter, torch.Tensor]] = []

    def raise_weights(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for p in parameters:
            if _is_lower(p, dtype):  # else an outer trial did it
                held.append((p, p.data))
                p.data = p.data.to(dtype)
        return tuple(_raised(value, dtype) for value in args)

    def put_back(*_: Any) -> None:
        while held:
            p, data = held.pop()
            p.data = data

    undo.callback(module.register_forward_pre_hook(raise_weights).remove)
    undo.callback(module.register_forward_hook(put_back, always_call=True).remove)


def _is_lower(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return _BITS.get(tensor.dtype, 64) < _BITS[dtype]


def _raised(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and _is_lower(value, dtype) else value
