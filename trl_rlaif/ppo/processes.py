"""Several processes: what they must do together, which is to average gradients, to step, and to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from trl_rlaif.errors import RunError, UserError

# These average on their own in the backward pass.
_OWN = (DistributedType.DEEPSPEED, DistributedType.FSDP)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, all in one message; they are a few adapters.

    By hand, since no forward pass goes through DDP's wrapper. Does nothing in a single process, and while
    gradients are still being accumulated.
    """
    if accelerator.num_processes == 1 or not accelerator.sync_gradients or accelerator.distributed_type in _OWN:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    means = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def backward(accelerator: Accelerator, loss: torch.Tensor, *, last: bool) -> None:
    """Add a loss's gradients. A micro-batch has several such passes, and ``last`` says which is the last one.

    It matters to DeepSpeed alone, whose backward pass averages the gradients and also takes the optimizer's
    step: it must do so once, after the last pass of the last micro-batch. And it must meet every trained
    parameter in every pass: where the optimizer is offloaded it would otherwise lose the gradients of those
    that are not in the last pass, and add the previous step's to the others.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.backward(loss)
        return
    parameters = (p for p in accelerator.deepspeed_engine_wrapped.engine.parameters() if p.requires_grad)
    # DeepSpeed divides by the number of micro-batches that it was built with; with minibatches it is another.
    loss = (loss + sum(p.flatten()[:0].sum() for p in parameters)) / accelerator.gradient_accumulation_steps
    steps = accelerator.sync_gradients
    accelerator.sync_gradients = steps and last
    try:
        accelerator.backward(loss, scale_wrt_gas=False)
    finally:
        accelerator.sync_gradients = steps


def equal_count(accelerator: Accelerator, passes: int) -> int:
    """How many backward passes this process must make that needs so many.

    With DeepSpeed each pass sends its gradients, so all processes make as many as the one that needs most.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return passes
    return max(gather_object([passes]))


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Stop every process where one fails: the others would wait for it, for ever.

    Within it, nothing may be sent from process to process.

    Raises:
        UserError, RunError: Another process failed, with its number and message; a UserError where that one
            has one. What was raised in this process goes on as it is.
    """
    if accelerator.num_processes == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = gather_object([_message(error)])
    if error is not None:
        raise error
    for process, message in enumerate(messages):
        if message is not None:
            kind, text = message
            raise (UserError if kind == "user" else RunError)(f"Process {process} failed: {text}")


def _message(error: Exception | None) -> tuple[str, str] | None:
    if error is None:
        return None
    if isinstance(error, UserError):
        return "user", str(error)
    return "run", str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
