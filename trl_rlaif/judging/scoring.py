"""Exact log-probabilities of given continuations, without generating text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tokens = Sequence[int]


def _maximal_prefixes(continuations: Sequence[Tokens]) -> list[tuple[int, ...]]:
    """What must stand behind the context so that every continuation's tokens are predicted once."""
    prefixes = {tuple(c[:-1]) for c in continuations}
    return sorted(p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes))


def _left_padded(rows: Sequence[Tokens], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row)
        mask[i, width - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
    }


@torch.no_grad()
def continuation_logprobs(
    model: torch.nn.Module, contexts: Sequence[Tokens], continuations: Sequence[Tokens], pad_id: int
) -> torch.Tensor:
    """log P(continuation | context) for every context and continuation.

    A continuation's log-probability is the sum over its tokens (methods.md, section 1). Continuations
    that share a beginning, such as "1" and "10", share a row.

    Args:
        model: A causal language model that takes ``logits_to_keep``.
        contexts: N token lists, each at least one token.
        continuations: K token lists, each at least one token, the same for every context.
        pad_id: Any valid id; it is masked.

    Returns:
        (N, K) float32, nats, on the CPU.
    """
    device = next(model.parameters()).device
    prefixes = _maximal_prefixes(continuations)
    rows = [[*context, *prefix] for context in contexts for prefix in prefixes]
    keep = max(map(len, prefixes)) + 1
    inputs = _left_padded(rows, pad_id, device)
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:]
    logprobs = logits.float().log_softmax(-1).view(len(contexts), len(prefixes), keep, -1)

    result = torch.zeros(len(contexts), len(continuations), device=device)
    for k, continuation in enumerate(continuations):
        body = tuple(continuation[:-1])
        row = next(i for i, prefix in enumerate(prefixes) if prefix[: len(body)] == body)
        for j, token in enumerate(continuation):
            position = keep - 1 - len(prefixes[row]) + j
            result[:, k] += logprobs[:, row, position, token]
    return result.cpu()


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
