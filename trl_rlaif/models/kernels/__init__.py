"""The same numbers from less work: LoRA layers, attention, precision and output heads, for every trainer.

``training_kernels`` and ``generation_kernels`` are the two contexts in which models compute; ``kernels`` switches parts
on or off. Nothing outside of this package imports its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trl_rlaif.models.kernels.attention import (
    PairRows,
    fastest_attention,
    plain_attention,
    refuse_own_mask,
    refuse_unknown,
    sliding_windows,
    takes_masks,
    trainable_attention,
)
from trl_rlaif.models.kernels.fused_lora import cast_adapter, fused_lora
from trl_rlaif.models.kernels.logprob_head import HEAD_ELEMENTS, is_plain, token_logprobs_of
from trl_rlaif.models.kernels.precision import autocast, cast_head, frozen_weights_cast
from trl_rlaif.models.kernels.static_cache import static_cache
from trl_rlaif.models.kernels.switches import DEFAULTS, Switch, kernels, used
from trl_rlaif.models.kernels.trials import trial
from trl_rlaif.models.sharding import is_shared_out
from trl_rlaif.models.shared_model import inner_model

__all__ = [
    "DEFAULTS",
    "HEAD_ELEMENTS",
    "PairRows",
    "Switch",
    "autocast",
    "fastest_attention",
    "generation_kernels",
    "is_plain",
    "kernels",
    "refuse_own_mask",
    "refuse_unknown",
    "sliding_windows",
    "static_cache",
    "takes_masks",
    "token_logprobs_of",
    "trainable_attention",
    "training_kernels",
    "trial",
    "used",
]


@contextmanager
def training_kernels(*models: nn.Module, bf16: bool, packed: bool = False, sharded: bool = False) -> Iterator[None]:
    """Train inside: fused LoRA layers, and under bfloat16 cast frozen weights and attention for it.

    Afterwards every model is what it was but for what it learned, to the last bit.

    Args:
        models: Plain, or PeftModels; of these the frozen linear layers are cast.
        bf16: Forward passes are under bfloat16 autocast.
        packed: Pairs are packed, whose attention is computed row by row on a CPU.
        sharded: Parameters will be shared out: layers then keep PEFT's ways and one precision, as where they are.
    """
    with ExitStack() as stack:
        for model in models:
            inner = inner_model(model)
            if isinstance(model, PeftModel) and not (sharded or is_shared_out(model)):
                if used("fused_lora", inner.device):
                    stack.enter_context(fused_lora(model))
                if bf16 and used("cast_weights", inner.device):
                    stack.enter_context(frozen_weights_cast(inner))
        if bf16 or packed:
            stack.enter_context(trainable_attention(*map(inner_model, models)))
        yield


@contextmanager
def generation_kernels(model: nn.Module, bf16: bool | None = None) -> Iterator[None]:
    """Generate inside, without gradients: adapters and the output head are cast once, and not for every token.

    Nothing inside may switch the adapter.

    Args:
        model: Causal language model in the desired role.
        bf16: Under bfloat16 autocast. None: where a model with adapters is held in bfloat16 or NF4; its adapters are
            float32, and every layer would compute them so.
    """
    inner = inner_model(model)
    weight = inner.get_input_embeddings().weight
    if bf16 is None:
        bf16 = weight.dtype == torch.bfloat16 and any(isinstance(m, BaseTunerLayer) for m in inner.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_attention(inner))
        if bf16:
            stack.enter_context(torch.autocast(weight.device.type, torch.bfloat16))
        if used("fused_lora", weight.device) and used("cast_weights", weight.device):
            stack.enter_context(fused_lora(inner))
            stack.enter_context(cast_adapter(inner))
        if used("cast_weights", weight.device):
            stack.enter_context(cast_head(inner))
        yield
