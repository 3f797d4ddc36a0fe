"""Safeguards for all training: attention with correct gradients, finite gradients, optimizers that stay paged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from trl_rlaif.errors import RunError


@contextmanager
def safe_training(trainer: Any) -> Iterator[None]:
    """Context for training: without cuDNN attention, with a paged optimizer's states paged again on resuming, and, in
    transformers' loop, with ``check_gradients`` before each step.

    Args:
        trainer: Of transformers or TRL. A custom loop calls ``check_gradients`` itself.
    """
    check = _GradientCheck()
    trainer.add_callback(check)
    try:
        with without_cudnn_attention():
            yield
    finally:
        trainer.remove_callback(check)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Context without cuDNN attention.

    Since torch 2.11, Hopper GPUs prefer cuDNN attention, whose backward pass gives NaN for fully masked queries, such
    as left padding (https://github.com/pytorch/pytorch/issues/196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class _GradientCheck(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        page_again(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not args.fp16:  # its scaler overflows on purpose, and then skips the step
            check_gradients(model, state.global_step + 1)


@torch.no_grad()
def page_again(optimizer: Any) -> None:
    """Move the loaded states of a paged bitsandbytes optimizer back into paged memory.

    It loads them as plain tensors (seen in 0.50), which would stay on the GPU for the rest of the run. Their attributes
    do not reveal this: a file keeps a tensor's attributes.

    Args:
        optimizer: Any; accelerate's wrapper or not.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not getattr(optimizer, "is_paged", False):
        return
    paged = {id(buffer) for buffer in optimizer.page_mng.paged_tensors}
    for parameter, state in optimizer.state.items():
        for name in {"state1", "state2"} & state.keys():
            loaded = state[name]
            if id(loaded) in paged:
                continue
            buffer = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
            if getattr(buffer, "is_paged", False):  # not on a CPU, and not if the state is small
                if parameter.device.type == "cuda":
                    torch.cuda.synchronize()  # the buffer is cleared by the GPU, and filled by the CPU
                state[name] = buffer.copy_(loaded)


def check_gradients(model: nn.Module, update: int) -> None:
    """Stop all processes before an optimizer step that would put NaN or infinity into the weights.

    Synchronizes the device once. DeepSpeed hides its gradients and has already taken its step by then: there the
    trained weights are checked, and the run stops before they are saved.

    Args:
        model: Its gradients are complete, and averaged over the processes.
        update: The number of the step, from 1, for the message.

    Raises:
        RunError: A gradient is not finite.
    """
    found = {
        name: p.detach() if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and p.numel()
    }
    device = next(model.parameters()).device
    largest = torch._foreach_norm(list(found.values()), math.inf)
    bad = torch.stack([~norm.isfinite().to(device) for norm in largest])
    count = bad.sum()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)  # of a sharded tensor, another process may hold the part that is not finite
    if not count.item():
        return
    names = [name for name, is_bad in zip(found, bad, strict=True) if is_bad]
    here = f"{len(names)} of {len(found)} tensors, the first is {names[0]}" if names else "in another process"
    raise RunError(
        f"Training stopped at update {update}: its gradients are not finite ({here}). Nothing of it was saved.",
        fix="Resume from the last checkpoint with a lower learning_rate or with bf16: false; if update "
        f"{update} fails again, look for extreme rewards or losses just before it.",
    )
