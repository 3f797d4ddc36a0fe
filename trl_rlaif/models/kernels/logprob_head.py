"""Log-probabilities and entropy of given tokens from hidden states, without the scores of a whole vocabulary."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear

from trl_rlaif.models.kernels.precision import CastLinear
from trl_rlaif.models.kernels.switches import used
from trl_rlaif.models.shared_model import backbone, inner_model

# Scores that are alive at once: 128 MiB in float32, whatever the vocabulary and the batch.
HEAD_ELEMENTS = 2**25

_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain(model: nn.Module) -> bool:
    """Whether a causal model's scores are its hidden states times its frozen output embedding, and no more.

    Some architectures scale or cap their scores, and LoRA may sit on the output embedding; tried out once. False where
    the kernel ``logprob_head`` is off.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if not used("logprob_head", inner.device) or type(head) not in (nn.Linear, CastLinear) or head.weight.requires_grad:
        return False
    if inner not in _plain:
        ids = torch.arange(3, 12, device=head.weight.device)[None]
        modes = {module: module.training for module in inner.modules()}
        with torch.no_grad():
            inner.eval()
            try:
                hidden = backbone(inner)(input_ids=ids, use_cache=False).last_hidden_state
                found = inner(input_ids=ids, use_cache=False).logits
            finally:
                for module, training in modes.items():
                    module.training = training
            expected = head(hidden)
            _plain[inner] = found.shape == expected.shape and torch.equal(found, expected)
    return _plain[inner]


def token_logprobs_of(
    hidden: torch.Tensor, head: nn.Linear, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token after a hidden state, and the entropy of its distribution.

    The gradient of a log-probability by its hidden state is computed along with it, (token's embedding - expected
    embedding) / temperature, while the scores are there; so none outlive their chunk, and none are computed twice.

    Args:
        hidden: (N, H), of any float dtype.
        head: Frozen output embedding, (V, H).
        tokens: (N,) int64.
        temperature: > 0.

    Returns:
        (logprobs, entropy), (N,) float32 each, nats. The first passes gradients to ``hidden``. The second does not,
        and is zero where no gradient is recorded.
    """
    if not len(hidden):  # with a graph all the same: a batch of empty responses has a backward pass too
        return hidden.float().sum(-1), hidden.new_zeros(0, dtype=torch.float32)
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, tokens, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(device, enabled=False):  # which would round products of float32 probabilities
            logprobs, entropy = _chunk_by_chunk(hidden, weight.to(dtype), bias, tokens, temperature, slope)
        if slope is not None:
            ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, by_logprob: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * by_logprob[:, None].to(slope.dtype), None, None, None, None


def _chunk_by_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: float,
    slope: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies; ``slope``, if given, is filled with the former's gradients."""
    dtype, bias = weight.dtype, bias if bias is None else bias.to(weight.dtype)
    logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
    entropy = torch.zeros_like(logprobs)
    for rows in torch.arange(len(hidden), device=hidden.device).split(max(16, HEAD_ELEMENTS // len(weight))):
        scores = linear(hidden[rows].to(dtype), weight, bias).float().div_(temperature)
        every = scores.sub_(scores.logsumexp(-1, keepdim=True))
        logprobs[rows] = every.gather(1, tokens[rows, None])[:, 0]
        if slope is None:
            continue
        probabilities = every.exp()
        entropy[rows] = -torch.linalg.vecdot(probabilities, every)
        expected = linear(probabilities.to(dtype), weight.t())
        slope[rows] = ((weight[tokens[rows]].float() - expected.float()) / temperature).to(slope.dtype)
    return logprobs, entropy
