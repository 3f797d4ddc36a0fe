"""Several processes of one run, as ``accelerate launch`` starts them: only the first one writes and reports.

Also what they must do together: average gradients, step, and stop. Importing this module imports neither torch nor
accelerate, since every command does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import RunError, UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn


def processes() -> int:
    """How many there are; read from what the launcher sets, without a word to the others."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes())) if processes() > 1 else 1


def is_first() -> bool:
    """Whether this is the process that writes; true where there is one only."""
    return processes() == 1 or int(os.environ.get("RANK", 0)) == 0


def join() -> Any:
    """Accelerate's state of these processes; the first call joins them, on CPUs if ``ACCELERATE_USE_CPU`` says so."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def wait() -> None:
    """Go on when all have come here."""
    if processes() > 1:
        join().wait_for_everyone()


def leave() -> None:
    """End what joins the processes. Left to the interpreter's end, its threads now and then abort the process."""
    if processes() > 1:
        wait()
        join().destroy_process_group()


def averages_itself(accelerator: Accelerator) -> bool:
    """Whether the processes' gradients are averaged in the backward pass, as DeepSpeed and FSDP do."""
    return accelerator.distributed_type in ("DEEPSPEED", "FSDP")


def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, all in one message; they are a few adapters.

    By hand, since no forward pass goes through DDP's wrapper. Does nothing in a single process, and while
    gradients are still being accumulated.
    """
    if accelerator.num_processes == 1 or not accelerator.sync_gradients or averages_itself(accelerator):
        return
    import torch

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
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
    if accelerator.distributed_type != "DEEPSPEED":
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
    if accelerator.distributed_type != "DEEPSPEED":
        return passes
    from accelerate.utils import gather_object

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
    from accelerate.utils import gather_object

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
