"""FSDP2: the frozen weights of a model's layers are sharded over the processes.

Trained weights, embeddings, norms and heads are replicated. So everything else is as with DDP: roles are switched
without communication, the adapters' gradients are averaged explicitly, and one process saves.
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
    """Whether the launcher requested FSDP, from its environment variables."""
    return distributed.processes() > 1 and _is_set("ACCELERATE_USE_FSDP")


def enabled(accelerator: Accelerator) -> bool:
    """Whether the processes were started with FSDP. On CPUs accelerate uses DDP instead."""
    return accelerator.distributed_type == "FSDP"


def problems() -> Iterator[Problem]:
    """Launcher settings that this package does not support, by their names in a configuration file."""
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
    """Keep this process's shard of each layer's frozen weights, and move everything else to its device.

    A layer's weights are gathered while it computes, in forward and backward passes: all processes must make equally
    many. No-op without FSDP.

    Args:
        model: A PeftModel, or a module that holds one; accelerate then prepares it as it is.
        layers: False: no sharding.

    Raises:
        UserError: All weights are trained, or the model's layer classes are not known.
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
    plugin.auto_wrap_policy = None  # accelerate would look for layers to shard again
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
    }
    for layer in reversed(found):  # nested ones first
        fully_shard(layer, ignored_params=set(layer.parameters()) - frozen, reshard_after_forward=True, **options)
    fully_shard(model, ignored_params=set(model.parameters()), **options)
    for tensor in (*model.parameters(), *model.buffers()):
        if not _is_shared_out(tensor):
            tensor.data = tensor.data.to(accelerator.device)
    # The layer that is called first would become the root, and refuse to be part of another one.
    model._get_fsdp_state()._lazy_init()


def hand_over(trainer: Any, *, layers: bool = True) -> None:
    """Have a transformers or TRL trainer train its adapters on sharded layers, as with DDP.

    No-op without FSDP.

    Args:
        trainer: Not yet training.
        layers: False: no sharding, every process holds the whole model.

    Raises:
        UserError: As ``share_out``.
    """
    accelerator = trainer.accelerator
    if not enabled(accelerator):
        return
    share_out(trainer.model, accelerator, layers=layers)
    trainer.is_fsdp_enabled = False  # checkpoints are written and read as by a single process
    accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)  # autocast only
    backward = accelerator.backward

    def averaged(loss: torch.Tensor, **options: Any) -> None:
        backward(loss, **options)
        distributed.average_gradients(accelerator, trainer.model)

    accelerator.backward = averaged


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights and may run forward passes independently. All must enter together.

    It nests. No-op if nothing is sharded.
    """
    layers = [layer for layer in _layers(model) if layer not in _whole]
    _gather(layers)
    try:
        yield
    finally:
        _release(layers)


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Inside ``gathered``, a context where each process has only its shard again."""
    layers = [layer for layer in _layers(model) if layer in _whole]
    _release(layers)
    try:
        yield
    finally:
        _gather(layers)


def gather_again(model: nn.Module) -> None:
    """Inside ``gathered``: to be called after one process has taken a state dict, which releases its weights."""
    with released(model):
        pass


def is_shared_out(model: nn.Module) -> bool:
    """Whether a model has sharded weights, whether they are gathered or not."""
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
    """The classes that transformers keeps on one device: a model's layers."""
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
