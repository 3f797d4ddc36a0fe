"""Several processes of a run, as started by ``accelerate launch``: only the first one writes and reports.

Also their joint operations: dividing batches, averaging gradients, and stopping. Importing this module imports
neither torch nor accelerate, since every command imports it.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from trl_rlaif.errors import RunError, UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

U = TypeVar("U")
T = TypeVar("T")
Rows = TypeVar("Rows")

# How long a process waits for the others, which may be waiting for a slow server. A dead process is noticed at once by
# its closed connection, or by the launcher, which ends all.
PATIENCE = timedelta(days=7)
# Seconds that other processes than the first wait before they report an error.
_BEFORE_TELLING = 5.0
_dividing: ContextVar[bool] = ContextVar("_dividing", default=False)


def processes() -> int:
    """Number of processes, from the launcher's environment, without communication."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def processes_here() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes())) if processes() > 1 else 1


def is_first() -> bool:
    """Whether this is the process that writes; true if it is the only one."""
    return rank() == 0


def rank() -> int:
    """Rank of this process."""
    return int(os.environ.get("RANK", 0)) if processes() > 1 else 0


def join() -> Any:
    """Accelerate's state of these processes; the first call joins them, on CPUs if ``ACCELERATE_USE_CPU`` is true."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    patience = {"timeout": PATIENCE} if processes() > 1 else {}
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **patience)


def wait() -> None:
    """Wait until all processes have reached this point."""
    if processes() > 1:
        join().wait_for_everyone()


def leave() -> None:
    """Close the process group. If left to the interpreter's exit, its threads occasionally abort the process."""
    if processes() > 1:
        wait()
        join().destroy_process_group()


def let_the_first_tell() -> None:
    """Delay errors of other processes: most occur in all, and the launcher ends all once the first has exited."""
    if not is_first():
        time.sleep(_BEFORE_TELLING)


def lost_another(error: Exception) -> bool:
    """Whether an error means that another process has ended: its connection is closed or was not established."""
    import torch

    lost = isinstance(error, torch.distributed.DistError) or "Connection" in str(error)  # what gloo raises
    return processes() > 1 and isinstance(error, RuntimeError) and lost


def end_with(code: int) -> None:
    """Exit immediately if there are several processes: the interpreter's cleanup may wait for others, or abort."""
    if processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Average all gradients, which are only those of adapters, over the processes in a single all-reduce.

    Done here, since no forward pass goes through DDP's wrapper, and FSDP shards only frozen weights. Does nothing in
    a single process, while gradients are still being accumulated, and with DeepSpeed, which averages them itself.
    """
    averaged = accelerator.num_processes == 1 or accelerator.distributed_type == "DEEPSPEED"
    if averaged or not accelerator.sync_gradients:
        return
    import torch

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        means = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def backward(accelerator: Accelerator, loss: torch.Tensor, *, last: bool) -> None:
    """Add a loss's gradients. A micro-batch has several such passes; ``last`` marks its last one.

    This matters only to DeepSpeed, whose backward pass averages the gradients and also takes the optimizer step: it
    must do so once, after the last pass of the last micro-batch. It also needs every trained parameter in every pass:
    with an offloaded optimizer, it would otherwise lose the gradients of those missing from the last pass, and add
    the previous step's gradients to the others.
    """
    if accelerator.distributed_type != "DEEPSPEED":
        accelerator.backward(loss)
        return
    parameters = (p for p in accelerator.deepspeed_engine_wrapped.engine.parameters() if p.requires_grad)
    # DeepSpeed would divide by the number of micro-batches that it was built with, which is wrong with minibatches.
    loss = (loss + sum(p.flatten()[:0].sum() for p in parameters)) / accelerator.gradient_accumulation_steps
    steps = accelerator.sync_gradients
    accelerator.sync_gradients = steps and last
    try:
        accelerator.backward(loss, scale_wrt_gas=False)
    finally:
        accelerator.sync_gradients = steps


def equal_parts(accelerator: Accelerator, parts: Sequence[Rows]) -> list[Rows]:
    """Parts of rows, each for one forward and backward pass, made equally many in all processes if necessary.

    With DeepSpeed, each backward pass exchanges gradients, and with FSDP, each pass gathers weights. All processes
    then make as many passes as the one that needs most, by halving their largest parts.

    Args:
        parts: Rows in order, as tensors or lists; all processes have equally many rows.
    """
    found: list[Any] = list(parts)
    if accelerator.distributed_type not in ("DEEPSPEED", "FSDP"):
        return found
    from accelerate.utils import gather_object

    for _ in range(max(gather_object([len(found)])) - len(found)):
        largest = max(range(len(found)), key=lambda i: len(found[i]))
        part, half = found[largest], (len(found[largest]) + 1) // 2
        found[largest : largest + 1] = part[:half], part[half:]
    return found


# ---- Work that is divided -----------------------------------------------------------------------------------


def share_of_batch(rows: int, steps: int) -> tuple[int, int]:
    """Divide a batch among the processes, which together train on the same rows as a single process.

    Args:
        rows: Rows per pass of a single process, and the maximum for each of several.
        steps: Gradient accumulation steps of a single process.

    Returns:
        Both numbers for each process.

    Raises:
        UserError: The batch cannot be divided.
    """
    share, rest = divmod(rows * steps, processes())
    if rest:
        raise UserError(
            f"A batch of {rows} x {steps} rows cannot be divided among {processes()} processes.",
            fix="Change per_device_train_batch_size or gradient_accumulation_steps, or the number of processes.",
        )
    at_once = max(size for size in range(1, rows + 1) if share % size == 0)
    return at_once, share // at_once


@contextmanager
def dividing() -> Iterator[None]:
    """Inside, all processes get the same work in the same order, which ``divided`` and ``from_first`` distribute.

    Outside, each process has its own work, such as the responses of its part of a batch.
    """
    token = _dividing.set(processes() > 1)
    try:
        yield
    finally:
        _dividing.reset(token)


@contextmanager
def undivided() -> Iterator[None]:
    """Inside, each process does all of the work: with sharded weights, all must make the same passes."""
    token = _dividing.set(False)
    try:
        yield
    finally:
        _dividing.reset(token)


def divided(units: Sequence[U], compute: Callable[[U], T]) -> Iterator[tuple[U, T]]:
    """Yield each unit of work with its result, in order, and the same in every process.

    Each unit, such as a batch, is computed by one process, so the results are exactly those of a single process.
    Inside ``dividing``, the processes take turns and exchange their results after each round. Results stored as they
    arrive are thus those of all processes, and a run can be resumed with any number of them.

    Args:
        units: Units of work; the same in every process.
        compute: Computes a unit, without communication between processes; its result must be picklable.

    Raises:
        UserError, RunError: As in ``failing_together``.
    """
    if not _dividing.get():
        yield from ((unit, compute(unit)) for unit in units)
        return
    count, mine = processes(), join().process_index
    for start in range(0, len(units), count):
        turn = units[start : start + count]
        found: list[T] = []
        with _gathering(found) as everyones:
            found += map(compute, turn[mine : mine + 1])
        yield from zip(turn, everyones, strict=True)


def from_first(items: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items of an iterator; inside ``dividing``, only the first process runs it and broadcasts the items.

    For work that more processes would repeat instead of speeding it up, such as requests to a server.

    Raises:
        UserError, RunError: As in ``failing_together``.
    """
    if not _dividing.get():
        yield from items()
        return

    def those_of_first() -> Iterator[T]:  # started where an error reaches all processes
        yield from items() if is_first() else ()

    source = those_of_first()
    while True:
        found: list[T] = []
        with _gathering(found) as everyones:
            found += itertools.islice(source, 1)
        if not everyones:
            return
        yield from everyones


def agreed(find: Callable[[], T]) -> T:
    """The first process's result, in every process: for measurements and other values that may change.

    Raises:
        UserError, RunError: As in ``failing_together``.
    """
    with dividing():
        (found,) = from_first(lambda: iter([find()]))
    return found


@contextmanager
def _gathering(found: list[T]) -> Iterator[list[T]]:
    """Yield a list that is filled on exit with ``found`` of all processes, in rank order; all fail if one does."""
    from accelerate.utils import gather_object

    everyones: list[T] = []
    error, token = None, _dividing.set(False)  # inside, this process has work of its own
    try:
        yield everyones
    except Exception as raised:
        error = raised
    finally:
        _dividing.reset(token)
    parts = gather_object([(found, _message(error))])
    _raise_alike(error, [message for _, message in parts])
    everyones += [one for of_process, _ in parts for one in of_process]


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Stop every process if one fails, since the others would wait for it forever.

    Inside, processes must not communicate.

    Raises:
        UserError, RunError: Another process failed; with its number and message, and a UserError if it raised one.
            Exceptions of this process propagate unchanged.
    """
    if accelerator.num_processes == 1:
        yield
        return
    nothing: list[None] = []
    with _gathering(nothing):
        yield


def _raise_alike(error: Exception | None, messages: Sequence[tuple[str, str] | None]) -> None:
    """Raise this process's error, or else another's, with its number."""
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
