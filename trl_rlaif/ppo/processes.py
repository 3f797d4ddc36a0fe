"""Several processes: gradients are averaged by hand, since no forward pass goes through DDP's wrapper."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

# These average on their own in the backward pass.
_OWN = (DistributedType.DEEPSPEED, DistributedType.FSDP)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, all in one message; they are a few adapters.

    Does nothing in a single process, and while gradients are still being accumulated.
    """
    if accelerator.num_processes == 1 or not accelerator.sync_gradients or accelerator.distributed_type in _OWN:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    means = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
