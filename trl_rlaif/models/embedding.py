"""Prompt embeddings from a language model's own hidden states, without a separate embedding model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from trl_rlaif.batching import pad_rows, token_batches
from trl_rlaif.distributed import divided

if TYPE_CHECKING:
    from torch import nn


@torch.no_grad()
def mean_hidden_states(model: nn.Module, prompts: Sequence[Sequence[int]], *, batch_tokens: int = 8192) -> np.ndarray:
    """Mean of the last hidden states over each prompt's tokens.

    Args:
        model: transformers language model, plain or PEFT, in the desired role (usually the bare base).
        prompts: N token sequences of at least one token.
        batch_tokens: Maximum tokens per forward pass, padding included.

    Returns:
        (N, H) float32.
    """
    from trl_rlaif.models.shared_model import backbone  # peft takes seconds to import, and plugins import this module

    model.eval()
    device = next(model.parameters()).device

    def means(batch: list[int]) -> np.ndarray:
        ids, mask = (x.to(device, torch.long) for x in pad_rows(prompts[i] for i in batch))
        hidden = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy()

    batches, of_batches = zip(*divided(token_batches([len(p) for p in prompts], batch_tokens), means), strict=True)
    found = np.empty((len(prompts), of_batches[0].shape[1]), np.float32)
    found[np.concatenate(batches)] = np.concatenate(of_batches)
    return found


def directions(embeddings: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Embeddings minus a center, normalized to unit length: (N, H) and (H,) to (N, H).

    Shared text, such as a chat template, gives all prompts a common direction. Without it, they differ by content.
    """
    apart = embeddings - centre
    return apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12)
