"""FSDP2: the frozen weights of a model's layers are shared out over the processes.

What is trained, and embeddings, norms and heads, stay whole in each process. So everything else is as with DDP: roles
are switched without a message, gradients of the adapters are averaged by hand, and what is saved is one process's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from trl_rlaif import distributed
from trl_rlaif.errors import Problem, UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn


def requested() -> bool:
    """Whether the launcher was told to use FSDP; read from what it sets."""
    return distributed.processes() > 1 and _is_set("ACCELERATE_USE_FSDP")


def enabled(accelerator: Accelerator) -> bool:
    """Whether the processes were started with FSDP. On CPUs accelerate takes DDP in its place."""
    return accelerator.distributed_type == "FSDP"


def problems() -> Iterator[Problem]:
    """What the launcher was told that does not go together with this package, as a configuration file names it."""
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if distributed.processes() > 1 and _is_set("ACCELERATE_USE_DEEPSPEED") and stage == "3":
        yield Problem("ZeRO-3 also shards the adapters, which trl-rlaif has to read.", fix="Use fsdp2.yaml.")
    if not requested():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        yield Problem("accelerate is configured for FSDP version 1.", fix="Set fsdp_version: 2.")
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        yield Problem(
            "fsdp_cpu_ram_efficient_loading is on: all processes but one would have no weights in the stages that "
            "share nothing out.",
            fix="Set fsdp_cpu_ram_efficient_loading: false.",
        )
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        yield Problem(
            "fsdp_activation_checkpointing is on.",
            fix="Set it to false; gradient_checkpointing: true in the recipe's section does the same.",
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def share_out(model: nn.Module, accelerator: Accelerator, *, layers: bool = True) -> None:
    """Keep this process's part of each layer's frozen weights, and put everything else on its device.

    A layer's weights are gathered while it computes, in forward and backward passes: all processes must make equally
    many. Does nothing without FSDP.

    Args:
        model: PEFT's, or one that holds it; accelerate then prepares it as it is.
        layers: False shares nothing out.

    Raises:
        UserError: All weights are trained, or the layers of such a model are not known.
    """
    if not enabled(accelerator):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = [child for child in model.modules() if type(child).__name__ in _layer_classes(model)] if layers else []
    kept = _adapters(model)
    frozen = {p for layer in found for p in layer.parameters() if not p.requires_grad} - kept
    if layers and not frozen:
        raise UserError(
            "FSDP shards the frozen weights of layers, and this model has none.",
            fix="Train adapters (peft_config), or start it with DDP.",
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = None  # accelerate would look for layers to share out again
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
    }
    for layer in reversed(found):  # those inside of others first
        fully_shard(layer, ignored_params=set(layer.parameters()) - frozen, reshard_after_forward=True, **options)
    fully_shard(model, ignored_params=set(model.parameters()), **options)
    for tensor in (*model.parameters(), *model.buffers()):
        if not _is_shared_out(tensor):
            tensor.data = tensor.data.to(accelerator.device)
    # The layer that is called first would take itself for the root, and refuse to be part of another one.
    model._get_fsdp_state()._lazy_init()


def hand_over(trainer: Any, *, layers: bool = True) -> None:
    """Have a trainer of transformers or TRL train its adapters on shared out layers, as it would with DDP.

    Does nothing without FSDP.

    Args:
        trainer: Not yet training.
        layers: False shares nothing out: every process holds all of the model.

    Raises:
        UserError: As ``share_out``.
    """
    accelerator = trainer.accelerator
    if not enabled(accelerator):
        return
    share_out(trainer.model, accelerator, layers=layers)
    trainer.is_fsdp_enabled = False  # checkpoints are written, and read, as they are of one process
    accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)  # autocast alone
    backward = accelerator.backward

    def averaged(loss: torch.Tensor, **options: Any) -> None:
        backward(loss, **options)
        distributed.average_gradients(accelerator, trainer.model)

    accelerator.backward = averaged


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights, and may make forward passes of its own. All processes must enter together.

    It nests. Does nothing where none are shared out.
    """
    layers = [layer for layer in _layers(model) if layer not in _whole]
    _gather(layers)
    try:
        yield
    finally:
        _release(layers)


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Inside of ``gathered``, a context where each process has its part alone again."""
    layers = [layer for layer in _layers(model) if layer in _whole]
    _release(layers)
    try:
        yield
    finally:
        _gather(layers)


def gather_again(model: nn.Module) -> None:
    """Inside of ``gathered``: after one process has asked for a state dict, which releases its weights."""
    with released(model):
        pass


def is_shared_out(model: nn.Module) -> bool:
    """Whether a model has weights of which this process has a part, whether they are gathered or not."""
    return bool(_layers(model))


# The layers whose weights are gathered.
_whole: WeakSet[Any] = WeakSet()


def _gather(layers: Sequence[Any]) -> None:
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    _whole.update(layers)


def _release(layers: Sequence[Any]) -> None:
    for layer in layers:
        layer.set_reshard_after_forward(True, recurse=False)
        layer.reshard()
    _whole.difference_update(layers)


def _layers(model: nn.Module) -> list[Any]:
    if not requested():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [child for child in model.modules() if isinstance(child, FSDPModule) and child is not model]


def _layer_classes(model: nn.Module) -> set[str]:
    """Classes of what transformers keeps on one device: a model's layers."""
    from transformers import PreTrainedModel

    models = (child for child in model.modules() if isinstance(child, PreTrainedModel))
    return {name for child in models for name in child._no_split_modules or ()}


def _adapters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all adapters, trained or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {p for part in parts if part is not None for p in part.parameters()}


def _is_shared_out(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
