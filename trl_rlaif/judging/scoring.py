"""Exact log-probabilities of given continuations, without generating text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from trl_rlaif.batching import Tokens, packed_batches, pad_rows, shared_prefix, token_batches
from trl_rlaif.judging.packed import PackedModel, packed_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ContinuationScorer:
    """Log-probabilities of the same continuations after many contexts, each token computed once.

    Contexts come in groups that share a prefix, such as the two orders of a pair. If the model's architecture
    does not allow packing (see PackedModel), they are padded instead.

    Args:
        model: Causal language model that takes ``logits_to_keep``.
        continuations: K token lists, each at least one token.
        longest: Maximum tokens of a context.
        pad_id: Any valid id; it is masked.
    """

    # Below this many shared tokens a cache costs more than it saves.
    MIN_PREFIX = 16

    def __init__(
        self, model: PreTrainedModel, continuations: Sequence[Tokens], *, longest: int, pad_id: int = 0
    ) -> None:
        self.model, self.continuations, self.pad_id = model, continuations, pad_id
        self._prefixes = _maximal_prefixes(continuations)
        self._keep = max(map(len, self._prefixes)) + 1
        self.packs = PackedModel.can_read(model, longest + self._keep)
        self._packed = PackedModel(model)
        self._prefix: list[int] = []

    def begin(self, contexts: Sequence[Tokens]) -> None:
        """Compute the shared prefix of all contexts once."""
        shared = shared_prefix(contexts, least=self._keep)
        self._prefix = list(contexts[0][:shared]) if self.packs and shared >= self.MIN_PREFIX else []
        self._packed.cache(self._prefix)

    def batches(self, groups: Sequence[Sequence[Tokens]], budget: int) -> list[list[int]]:
        """Indices of groups in batches, each within a token budget."""
        if self.packs:
            return packed_batches([packed_length(group, self._packed.cached) for group in groups], budget)
        return token_batches([len(group) * max(map(len, group)) for group in groups], budget)

    @torch.no_grad()
    def __call__(self, groups: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """As ``logprobs``, without gradients, on the CPU."""
        return self.logprobs(groups).cpu()

    def logprobs(self, groups: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """log P(continuation | context): (contexts, K) float32, nats, group by group, with gradients if they are on.

        A continuation's log-probability is the sum over its tokens. Continuations
        that share a prefix, such as "1" and "10", share a sequence.
        """
        groups = [[[*context, *prefix] for context in group for prefix in self._prefixes] for group in groups]
        # A later context, such as one after a rationale, may be tokenized differently from early on.
        packs = self.packs and all(row[: len(self._prefix)] == self._prefix for group in groups for row in group)
        logits = self._packed.logits(groups, self._keep) if packs else self._padded(groups)
        keep, prefixes = self._keep, self._prefixes
        logprobs = logits.float().log_softmax(-1).view(-1, len(prefixes), keep, logits.shape[-1])
        result = []
        for continuation in self.continuations:
            body = tuple(continuation[:-1])
            row = next(i for i, prefix in enumerate(prefixes) if prefix[: len(body)] == body)
            first = keep - 1 - len(prefixes[row])
            result.append(sum(logprobs[:, row, first + j, token] for j, token in enumerate(continuation)))
        return torch.stack(result, 1)

    def kept_packed(self) -> AbstractContextManager[None]:
        """As ``PackedModel.kept_packed``; no effect if contexts are padded."""
        return self._packed.kept_packed()

    def _padded(self, groups: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """Padded on the right: no token sees what comes after it, and a recurrent state has read nothing before it."""
        ids, mask = pad_rows((tokens for group in groups for tokens in group), self.pad_id)
        wanted = mask.sum(1, keepdim=True) + torch.arange(-self._keep, 0)
        # The head computes the same positions of all rows; each row's own are picked from these.
        positions, picked = wanted.unique(return_inverse=True)
        ids, mask, positions, picked = (x.to(self.model.device) for x in (ids, mask.long(), positions, picked))
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=positions).logits
        return logits[torch.arange(len(ids), device=logits.device)[:, None], picked]


def _maximal_prefixes(continuations: Sequence[Tokens]) -> list[tuple[int, ...]]:
    """Prefixes to append to the context so that every continuation's tokens are predicted once."""
    prefixes = {tuple(c[:-1]) for c in continuations}
    return sorted(p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes))


def subtract(whole: float, part: float) -> float:
    """log(exp(whole) - exp(part)); -inf if rounding leaves nothing."""
    return whole + math.log1p(-math.exp(part - whole)) if part < whole else -math.inf


def add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
