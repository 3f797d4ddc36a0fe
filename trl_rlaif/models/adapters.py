"""LoRA adapters fitted to a model: only on its text model, and only on layers that LoRA supports."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_rlaif.errors import UserError
from trl_rlaif.models.shared_model import backbone

if TYPE_CHECKING:
    from trl_rlaif.recipe import LoraSection


def lora_config(section: LoraSection) -> LoraConfig:
    """A recipe's ``model.lora``, for a causal language model."""
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )


def fitted(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """An adapter's configuration restricted to a model's text part: never on image or audio encoders.

    Args:
        config: Of a new adapter. Only LoRA's is examined.
        model: A transformers model without adapters.

    Returns:
        A copy, with ``exclude_modules`` if the model is multimodal and the targets would match more than text.

    Raises:
        UserError: An adapter cannot work on one of the targets; the message names targets that it can work on.
    """
    if not isinstance(config, LoraConfig) or not isinstance(model, PreTrainedModel):
        return config
    config = copy.deepcopy(config)
    everything = str(config.target_modules).lower() == "all-linear"
    others = [
        name
        for name, part in beside_text(model)
        for inside, module in part.named_modules(prefix=name)
        if isinstance(module, nn.Linear) and (everything or check_target_module_exists(config, inside))
    ]
    if others and not config.exclude_modules:
        config.exclude_modules = rf"({'|'.join(map(re.escape, dict.fromkeys(others)))})(\..*)?"
    _check_targets(config, type(model), model.config)
    return config


def beside_text(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model, with their names, that are neither its text model, nor around it, nor a head."""
    text, heads = backbone(model), (model.get_output_embeddings(), getattr(model, "score", None))
    path = next(name for name, module in model.named_modules() if module is text).split(".")
    for depth, step in enumerate(path):
        for name, part in model.get_submodule(".".join(path[:depth])).named_children():
            if name != step and not any(part is head for head in heads):
                yield ".".join([*path[:depth], name]), part


def trained_values(model: Any) -> dict[nn.Parameter, torch.Tensor]:
    """The values of a model's trained parameters before TRL's trainers change them, for ``train_in_float32``."""
    return {p: p.data for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else {}


def train_in_float32(trainer: Any, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Have one of TRL's trainers train adapters in float32, whatever the base's dtype.

    TRL rounds those on a quantized base to bfloat16, and PEFT leaves a head (``modules_to_save``) in the base's dtype.
    An update below 2^-9 of a weight is then lost, as are most at the learning rates of DPO and RL.

    Args:
        trainer: Not yet training. A model without adapters is unchanged. So are heads without bf16 or fp16: only
            under autocast may their dtype differ from their input's.
        values: Of the model before the trainer rounded them.
    """
    if not isinstance(trainer.model, PeftModel):
        return
    mixed = trainer.args.bf16 or trainer.args.fp16
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and (mixed or "lora_" in name):
            parameter.data = values.get(parameter, parameter.data).to(parameter.device, torch.float32)


def _check_targets(config: LoraConfig, kind: type[PreTrainedModel], model_config: PretrainedConfig) -> None:
    """Try the adapter on weightless copies of the model: when PEFT raises, it leaves a partial adapter behind."""

    def refusal(config: LoraConfig) -> str | None:
        return _refusal(kind(copy.deepcopy(model_config)), copy.deepcopy(config))

    with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            twin = kind(copy.deepcopy(model_config))
        except Exception:  # a class that is made in another way: PEFT has the last word then
            return
        reason = refusal(config)
        if reason is None:
            return
        linears = [name for name, part in backbone(twin).named_modules() if isinstance(part, nn.Linear | Conv1D)]
        names = sorted({name.rpartition(".")[2] for name in linears})
        good = [name for name in names if refusal(LoraConfig(target_modules=[name])) is None]
    raise UserError(
        f"LoRA does not work on target_modules {_shown(config.target_modules)} of {kind.__name__}: {reason}",
        fix=f"These work: target_modules: [{', '.join(good)}].",
    )


def _refusal(twin: PreTrainedModel, config: LoraConfig) -> str | None:
    """Why an adapter cannot work on a model, or None where it can."""
    try:
        peft = get_peft_model(twin, config)
    except ValueError as error:
        return str(error).strip().rstrip(".") + "."
    layers = {name: layer for name, layer in peft.named_modules() if isinstance(layer, LoraLayer)}
    odd = {name.rpartition(".")[2] for name, layer in layers.items() if not _gives_tensor(layer.get_base_layer())}
    if odd:
        return f"{', '.join(sorted(odd))} returns more than a tensor, so an adapter's output cannot be added."
    if _all_idle(twin, list(layers.values())):
        return "the model reads these layers' weights without calling them, so that an adapter would change nothing."
    return None


def _all_idle(twin: PreTrainedModel, layers: list[LoraLayer]) -> bool:
    """Whether a forward pass calls none of these layers, like Mamba's dt_proj; False if that cannot be tried."""
    called: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    try:
        twin(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        return not called
    except Exception:  # without values, experts cannot be chosen, say
        return False
    finally:
        for hook in hooks:
            hook.remove()


def _gives_tensor(layer: nn.Module) -> bool:
    """Whether a linear layer's output is a tensor that LoRA can add to. Some MoE routers subclass linear layers."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    return isinstance(layer(torch.empty(1, layer.in_features)), torch.Tensor)


def _shown(targets: Any) -> str:
    return f"'{targets}'" if isinstance(targets, str) else f"[{', '.join(sorted(targets or ()))}]"
