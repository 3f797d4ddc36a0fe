"""Sequence classification models for every causal family, even if transformers has no class for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def classifier_config(path: str, num_labels: int) -> PretrainedConfig:
    """The configuration of the classifier that has the same backbone as a checkpoint's causal language model.

    For some multimodal checkpoints transformers builds a text-only causal model, but a multimodal classifier, whose
    layers have other names: an adapter of one would not fit the other. Then this is the text model's configuration.

    Args:
        path: Hub id or folder.
        num_labels: Outputs of the head.

    Returns:
        A configuration that ``AutoModelForSequenceClassification`` knows a class for, if one can be made.
    """
    config = AutoConfig.from_pretrained(path)
    causal = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if causal is not None and causal.config_class is not type(config):
        quantized = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantized is not None:
            config.quantization_config = quantized
    config.num_labels = num_labels
    register_classifier(type(config))
    return config


def register_classifier(config_class: type[PretrainedConfig]) -> None:
    """Register a class with this process's ``AutoModelForSequenceClassification`` for a causal family without one.

    It is built like transformers' own, from ``GenericForSequenceClassification``: the causal model's backbone with a
    linear head ``score``. Plain transformers in another process cannot load what it saves.
    """
    causal = AutoModelForCausalLM._model_mapping.get(config_class, None)
    if causal is None or config_class in AutoModelForSequenceClassification._model_mapping:
        return
    family = next(base for base in causal.__mro__ if PreTrainedModel in base.__bases__)
    name = f"{family.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    members = {
        "base_model_prefix": family.base_model_prefix or "model",
        "config_class": config_class,
        # transformers finds the renaming of a checkpoint's weights by a class's module.
        "__module__": causal.__module__,
    }
    classifier = type(name, (_Classifier, family), members)
    AutoModelForSequenceClassification.register(config_class, classifier, exist_ok=True)


class _Classifier(GenericForSequenceClassification):
    """transformers' generic classifier, also for backbones whose output lacks fields that it reads (Mamba)."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        getattr(self, self.base_model_prefix).register_forward_hook(_whole_output)


def _whole_output(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    for name in ("past_key_values", "attentions"):
        if not hasattr(output, name):
            setattr(output, name, None)


def weightless(path: str) -> PreTrainedModel | None:
    """The classifier of a checkpoint on the meta device, or None if transformers cannot read it."""
    try:
        config = AutoConfig.from_pretrained(path)
        register_classifier(type(config))
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, KeyError):  # loading it reports why
        return None
