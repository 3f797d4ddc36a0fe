"""The precision of forward passes: bfloat16 where the arguments say so, from weights that are held in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def autocast(args: Any, device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast with ``args.bf16``, else nothing.

    The parent hands ``bf16`` to nobody: with transformers 5 its accelerator is left without a precision, or with
    that of whatever trainer ran before in the same process.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if args.bf16 else nullcontext()


class CastLinear(nn.Linear):
    """A frozen layer held in bfloat16. Outside of autocast it takes any float, and gives back the same."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(input.device.type) or input.dtype == self.weight.dtype:
            return super().forward(input)
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def cast_frozen_weights(model: nn.Module) -> None:
    """Hold a model's frozen linear layers in what autocast makes of them in every forward pass.

    The results under autocast are the same to the last bit, without the copies; the memory is half. Weights that
    the input embedding shares are left alone, and what is in less than float32 already.
    """
    for layer, parameters in _holdable(model):
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
        layer.__class__ = CastLinear


@contextmanager
def frozen_weights_cast(model: nn.Module) -> Iterator[None]:
    """``cast_frozen_weights`` for a while: every weight is what it was afterwards, to the last bit."""
    # Only copies that cannot be made again from bfloat16 are kept (many a checkpoint was saved in it), none on a GPU.
    before = [
        (layer, [(p, None if torch.equal(p, p.bfloat16().float()) else p.data.cpu()) for p in parameters])
        for layer, parameters in _holdable(model)
    ]
    try:
        cast_frozen_weights(model)
        yield
    finally:
        for layer, kept in before:
            for parameter, data in kept:
                parameter.data = parameter.data.float() if data is None else data.to(parameter.device)
            layer.__class__ = nn.Linear


def _holdable(model: nn.Module) -> list[tuple[nn.Linear, list[nn.Parameter]]]:
    embedding = model.get_input_embeddings().weight
    found = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or "lora_" in name or module.weight is embedding:
            continue
        parameters = [p for p in (module.weight, module.bias) if p is not None]
        if module.weight.dtype == torch.float32 and not any(p.requires_grad for p in parameters):
            found.append((module, parameters))
    return found


@contextmanager
def cast_head(model: nn.Module) -> Iterator[None]:
    """Hold an output embedding that shares the input's float32 weights in bfloat16 for a while.

    Generating casts it for every token otherwise; what autocast computes stays the same.
    """
    head = model.get_output_embeddings()
    device = next(model.parameters()).device.type
    if type(head) is not nn.Linear or not torch.is_autocast_enabled(device) or head.weight.requires_grad:
        yield
        return
    before = head.weight
    head.weight = nn.Parameter(before.to(torch.get_autocast_dtype(device)), requires_grad=False)
    try:
        yield
    finally:
        head.weight = before
