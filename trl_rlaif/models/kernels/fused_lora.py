"""LoRA layers that compute the same as PEFT's in fewer steps and with fewer copies."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear

_thread = threading.local()


def fuse_lora(model: nn.Module) -> list[LoraLayer]:
    """Let a model's LoRA layers on linear layers take the short way wherever it gives the same result; the layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_linear(layer)]
    for layer in layers:
        layer.__class__ = _fused(type(layer))
    return layers


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """``fuse_lora`` inside, and PEFT's layers again afterwards."""
    layers = fuse_lora(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = type(layer).__bases__[1]


def _is_linear(layer: LoraLayer) -> bool:
    return type(layer).__name__ in ("Linear", "Linear4bit") and isinstance(layer.get_base_layer(), nn.Linear)


_Layer: Any = object  # PEFT's layer, which it is joined with


@lru_cache
def _fused(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (_Fused, kind), {})


class _Fused(_Layer):
    """One product behind the base's, added where that one lies; PEFT makes five tensors of it."""

    # The active adapter's weights as autocast has them, A and the transpose of B, and its scaling; see cast_adapter.
    _cast: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._cast is not None and not args and not kwargs:
            a, b, scaling = self._cast
            x = cast_once(x)
            base = self.base_layer(x)
            return torch.addmm(base.flatten(0, -2), linear(x, a).flatten(0, -2), b, alpha=scaling).view_as(base)
        name = self._short_way()
        # A 4-bit layer gives back what it is given; PEFT keeps float32 there, where a cast input would not.
        autocast = torch.is_autocast_enabled(x.device.type)
        quantized = autocast and x.dtype == torch.float32 and self.base_layer.weight.dtype == torch.uint8
        if args or kwargs or name is None or quantized:
            return super().forward(x, *args, **kwargs)
        x = cast_once(x)
        base = self.base_layer(x)
        if not name:
            return base
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if not autocast and not x.dtype == base.dtype == a.dtype:
            return super().forward(x)
        inner = linear(x, a).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), inner, b.t(), alpha=self.scaling[name]).view_as(base)

    def _short_way(self) -> str | None:
        """The one active adapter, "" for none, or None where PEFT must do it."""
        if self.merged_adapters:
            return None
        names = [name for name in self._active_adapter if name in self.lora_A]
        if self._disable_adapters or not names:
            return ""
        plain = (
            len(names) == 1
            and names[0] not in self.lora_variant
            and self.lora_B[names[0]].bias is None
            and (not self.training or isinstance(self.lora_dropout[names[0]], nn.Identity))
        )
        return names[0] if plain else None


@contextmanager
def cast_adapter(model: nn.Module) -> Iterator[None]:
    """Hold the active adapter's weights in autocast's precision while tokens are generated.

    Autocast casts them for every token otherwise. What is computed stays the same to the last bit, but on a 4-bit layer
    whose input is float32: that gives bfloat16 too. Nothing inside may switch the adapter, or ask for gradients.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _Fused)]
    device = next(model.parameters()).device
    held = []
    try:
        if torch.is_autocast_enabled(device.type) and not torch.is_grad_enabled():
            dtype = torch.get_autocast_dtype(device.type)
            for layer in layers:
                name = layer._short_way()
                if name:
                    a, b = (part[name].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
                    layer._cast = a, b.t(), layer.scaling[name]
                    held.append(layer)
        yield
    finally:
        for layer in held:
            del layer._cast


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """What autocast makes of a float32 input, once for all layers that are given the same tensor.

    Query, key and value projections, each with its adapter, would otherwise make six copies of it and keep three.
    """
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return x
    if torch.compiler.is_compiling():  # the compiler finds what is computed twice, and can read neither line below
        return x.to(torch.get_autocast_dtype(x.device.type))
    if x.is_inference():
        return x
    known = getattr(_thread, "cast", None)
    grad = torch.is_grad_enabled()
    if known is not None and known[0]() is x and known[1:3] == (x._version, grad):
        return known[3]
    result = x.to(torch.get_autocast_dtype(x.device.type))
    # Gone with its source: what is not read again must not stay in memory.
    _thread.cast = (weakref.ref(x, lambda _: setattr(_thread, "cast", None)), x._version, grad, result)
    return result
