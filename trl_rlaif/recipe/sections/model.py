"""The section ``model``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trl_rlaif.recipe.sections.values import Dtype, ModelPath, Number, Quantization, Section, TemplateKwargs, Text


class LoraSection(Section):
    """``model.lora``: the adapters that are trained."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="LoRA alpha; updates are scaled by alpha / r.")
    dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: Text | list[Text] = Field(
        "all-linear", description="Module names that get an adapter, or 'all-linear'."
    )


class ModelSection(Section):
    """``model``: the initial policy, which is also the base that all roles share."""

    path: ModelPath = Field(
        description="A Hub id, a model folder, a .gguf file, or package:NAME for a package with one."
    )
    dtype: Dtype = Field(
        "auto", description="Data type of the weights; auto: bfloat16 if the machine computes it fast, else float32."
    )
    quantization: Quantization = Field("none", description="nf4 loads the base in 4 bits with bitsandbytes.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The LoRA adapters to train.")
    reasoning: Literal["strip", "keep"] = Field(
        "strip", description="strip hides a response's reasoning from rewards, judges and reports; keep shows it."
    )
    reasoning_tags: list[Text] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Opening and closing tag of reasoning; null: those of the chat template.",
    )
    matmul_precision: Literal["auto", "highest", "high", "medium"] = Field(
        "auto",
        description="torch.set_float32_matmul_precision: high and medium allow TF32 and bfloat16; auto: high with "
        "16-bit weights on a GPU, else highest.",
    )
    chat_template_kwargs: TemplateKwargs
