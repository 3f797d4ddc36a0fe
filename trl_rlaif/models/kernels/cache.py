"""A key-value cache that grows by blocks, where transformers' copies all it holds for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 128


class BlockLayer(DynamicLayer):
    """A layer's keys and values, (batch, heads, tokens, width) each, as views of a larger reserve."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._length = 0
        self._reserve: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values; all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._reserve is None or self._length > self._reserve[0].shape[-2]:
            self._grow(key_states, value_states, start)
        for new, reserve in zip((key_states, value_states), self._reserve, strict=True):
            reserve[:, :, start : self._length] = new
        self.keys, self.values = (reserve[:, :, : self._length] for reserve in self._reserve)
        return self.keys, self.values

    def _grow(self, key_states: torch.Tensor, value_states: torch.Tensor, filled: int) -> None:
        room = -(-self._length // BLOCK) * BLOCK
        grown = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (key_states, value_states))
        if filled:
            for new, old in zip(grown, self._reserve, strict=True):
                new[:, :, :filled] = old[:, :, :filled]
        self._reserve = grown


def block_cache(model: torch.nn.Module) -> DynamicCache | None:
    """A cache for one call of ``generate``; None where the model keeps something else than growing keys and values."""
    if not getattr(type(model), "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=model.config.get_text_config())
    if cache.layers and not any(type(layer) is DynamicLayer for layer in cache.layers):
        return None  # such a model may know its cache by another name, as Mamba does
    cache.layers = [BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
