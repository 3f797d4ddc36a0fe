"""Exact log-probabilities of given continuations, without generating text."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import DynamicCache

Tokens = Sequence[int]


def _maximal_prefixes(continuations: Sequence[Tokens]) -> list[tuple[int, ...]]:
    """What must stand behind the context so that every continuation's tokens are predicted once."""
    prefixes = {tuple(c[:-1]) for c in continuations}
    return sorted(p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes))


def _shared_prefix(rows: Sequence[Tokens]) -> int:
    """How many tokens all rows begin with; at least one token of each row stays outside."""
    first, last = min(rows), max(rows)  # in lexicographic order these two differ the earliest
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def _left_padded(rows: Sequence[Tokens], cached: int, pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows without their first ``cached`` tokens, padded on the left behind those."""
    width = max(map(len, rows)) - cached
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) + cached :] = torch.as_tensor(row[cached:])
        mask[i, width - len(row) + cached :] = 1
    positions = (cached + mask.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat((mask.new_ones(len(rows), cached), mask), 1)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device)}


class ContinuationScorer:
    """Exact log-probabilities of continuations under one model.

    What all rows of a batch begin with, such as a judge's instructions, is computed once and kept until a
    batch begins otherwise.

    Args:
        model: A causal language model that takes ``logits_to_keep`` and a key-value cache.
        pad_id: Any valid id; it is masked.
    """

    # Below this many shared tokens a cache costs more than it saves.
    MIN_PREFIX = 16

    def __init__(self, model: torch.nn.Module, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        # A sliding window counts positions in the row, the padding behind the cached prefix among them.
        self._can_share = not getattr(model.config.get_text_config(), "sliding_window", None)
        self._prefix: Tokens = ()
        self._cache: DynamicCache | None = None

    @torch.no_grad()
    def __call__(self, contexts: Sequence[Tokens], continuations: Sequence[Tokens]) -> torch.Tensor:
        """log P(continuation | context) for every context and continuation.

        A continuation's log-probability is the sum over its tokens (methods.md, section 1). Continuations
        that share a beginning, such as "1" and "10", share a row.

        Args:
            contexts: N token lists, each at least one token.
            continuations: K token lists, each at least one token, the same for every context.

        Returns:
            (N, K) float32, nats, on the CPU.
        """
        device = next(self.model.parameters()).device
        prefixes = _maximal_prefixes(continuations)
        rows = [[*context, *prefix] for context in contexts for prefix in prefixes]
        keep = max(map(len, prefixes)) + 1
        shared = min(_shared_prefix(rows), min(map(len, contexts)) - 1)
        if not self._can_share or shared < self.MIN_PREFIX or len(rows) == 1:
            shared = 0
        inputs = _left_padded(rows, shared, self.pad_id, device)
        if shared:
            inputs["past_key_values"] = self._cached(rows[0][:shared], len(rows), device)
        logits = self.model(**inputs, use_cache=bool(shared), logits_to_keep=keep).logits[:, -keep:]
        logprobs = logits.float().log_softmax(-1).view(len(contexts), len(prefixes), keep, -1)
        result = torch.zeros(len(contexts), len(continuations), device=device)
        for k, continuation in enumerate(continuations):
            body = tuple(continuation[:-1])
            row = next(i for i, prefix in enumerate(prefixes) if prefix[: len(body)] == body)
            for j, token in enumerate(continuation):
                position = keep - 1 - len(prefixes[row]) + j
                result[:, k] += logprobs[:, row, position, token]
        return result.cpu()

    def _cached(self, prefix: Tokens, rows: int, device: torch.device) -> DynamicCache:
        """Keys and values of the prefix for so many rows; a forward pass may append to them."""
        if self._cache is None or list(prefix) != list(self._prefix):
            self._cache = DynamicCache(config=self.model.config)
            ids = torch.as_tensor([list(prefix)], device=device)
            self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._prefix = prefix
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of like length whose padded size stays within a token budget.

    Args:
        lengths: Tokens of each item.
        budget: Most tokens in a batch, padding counted; an item longer than that is a batch of its own.

    Returns:
        Batches, the longest first (memory trouble shows at once); ties keep their order. The result
        depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    width = 0
    for i in order:
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            width = lengths[i]
    return batches
