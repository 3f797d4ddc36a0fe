"""Judges in a recipe, and the section ``judge``, which teaches one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from trl_rlaif.recipe.sections.values import (
    DataPath,
    Dtype,
    ModelPath,
    Named,
    Number,
    PromptFolder,
    Quantization,
    Section,
    TemplateKwargs,
    Text,
    web_address,
)
from trl_rlaif.teaching import KINDS as CONTRASTS
from trl_rlaif.teaching import Contrast


def _addresses(value: str | list[str] | None) -> str | list[str] | None:
    """Reject invalid addresses and a server that is named twice."""
    named = value if isinstance(value, list) else [value] if value is not None else []
    for address in named:
        web_address(address)
    if len({address.rstrip("/") for address in named}) < len(named):
        raise ValueError("Name each server once.")
    return value


class JudgeSection(Section):
    """A judge that is a model of its own, in this process."""

    backend: Literal["transformers"] = Field("transformers", description="Where the judge runs.")
    path: ModelPath = Field(description="The judge's Hub id, model folder, .gguf file or package:NAME.")
    dtype: Dtype = Field("auto", description="Data type of the judge's weights; auto as for model.dtype.")
    quantization: Quantization = Field("none", description="nf4 loads the judge in 4 bits with bitsandbytes.")
    chat_template_kwargs: TemplateKwargs

    def __hash__(self) -> int:
        """By content, so that a judge used twice is loaded once."""
        return hash(self.model_dump_json())


class VLLMJudgeSection(JudgeSection):
    """A judge that is a model of its own on this machine, in vLLM's engine."""

    backend: Literal["vllm"] = Field(description="vllm: vLLM's offline engine, without a server.")
    path: ModelPath = Field(description="The judge's Hub id, model folder, .gguf file or package:NAME.")
    quantization: Literal["none"] = Field("none", description="A quantized checkpoint is loaded as it is.")
    gpu_memory_utilization: Number = Field(
        0.9, gt=0, le=1, description="Fraction of each GPU's memory that vLLM reserves for weights and cache."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Number of GPUs to split the judge across.")
    max_model_len: int | None = Field(
        None, ge=1, description="Maximum tokens of question and answer; null: the model's context."
    )
    enforce_eager: bool = Field(False, description="true skips compilation: faster start, slower computation.")

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        return {name: getattr(self, name) for name in VLLMJudgeSection.model_fields.keys() - JudgeSection.model_fields}


class PriceSection(Section):
    """What a hosted judge costs."""

    input: Number = Field(ge=0, description="Price per million input tokens, in any currency.")
    output: Number = Field(ge=0, description="Price per million output tokens.")


class ServerJudgeSection(Section):
    """A judge on an OpenAI-compatible server."""

    backend: Literal["openai"] = Field(description="openai: any OpenAI-compatible server.")
    path: Text = Field(description="The model's name on the server.")
    base_url: Annotated[Text | Annotated[list[Text], Field(min_length=1)] | None, AfterValidator(_addresses)] = Field(
        None,
        description="The server, such as http://localhost:8000/v1, or a list of servers with the same model; "
        "null: OpenAI's.",
    )
    api_key_env: Text = Field("OPENAI_API_KEY", description="Environment variable with the API key.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat, or completions for base models, which are asked in plain text."
    )
    prefill: Literal["auto"] | bool = Field(
        "auto",
        description="Whether the server can continue a given start of a chat answer (vLLM can); auto: tried once.",
    )
    tolerance: Number = Field(
        0.01,
        ge=0,
        le=1,
        description="Probability mass of an answer that may lie outside the tokens that the server lists.",
    )
    top_logprobs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = Field(
        "auto", description="Top tokens to request; auto: 20, or 200 once a candidate was missing among them."
    )
    votes: int = Field(
        0, ge=0, description="Answers to sample if a server returns no log-probabilities; 0 skips the pair."
    )
    concurrency: int = Field(
        8, ge=1, description="Concurrent requests over all servers; fewer for a server that is overloaded."
    )
    timeout: Number = Field(60.0, gt=0, description="Timeout of a request in seconds.")
    max_retries: int = Field(6, ge=0, description="Retries of a failed request, with exponential backoff.")
    price: PriceSection | None = Field(None, description="Token prices, from which the report computes the total cost.")
    chat_template_kwargs: TemplateKwargs
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Additional fields in the body of every request."
    )

    def __hash__(self) -> int:
        """By content, so that a judge used twice has one connection."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _templated(self) -> ServerJudgeSection:
        if self.api == "completions" and self.chat_template_kwargs:
            raise ValueError("Plain text has no chat template: leave out chat_template_kwargs, or set api: chat.")
        return self


def _judge_form(value: Any) -> str:
    if isinstance(value, dict):
        backend = value.get("backend")
        return {"openai": "<server>", "vllm": "<engine>"}.get(backend if isinstance(backend, str) else "", "<model>")
    kinds: dict[Any, str] = {ServerJudgeSection: "<server>", VLLMJudgeSection: "<engine>", JudgeSection: "<model>"}
    return kinds.get(type(value), "<own>")


Judge = Annotated[
    Annotated[Literal["same", "taught"], Tag("<own>")]
    | Annotated[JudgeSection, Tag("<model>")]
    | Annotated[VLLMJudgeSection, Tag("<engine>")]
    | Annotated[ServerJudgeSection, Tag("<server>")],
    Discriminator(_judge_form),
]

JUDGES = (
    "'same' uses the run's base, 'taught' the judge taught by the stage 'judge'; a mapping configures another model."
)


class OtherJudgeSection(Section):
    """A judge beside the main one; what it leaves out is the main one's."""

    judge: Judge | None = Field(None, description="The judge.")
    prompt: PromptFolder | None = Field(None, description="A packaged prompt's name or a prompt folder.")


class TeachingSection(Section):
    """``judge``: teach the judge with an adapter, from pairs whose better response is known. Accepts the other keys of
    TrainingArguments."""

    model: Annotated[
        Annotated[Literal["same"], Tag("<own>")]
        | Annotated[JudgeSection, Tag("<model>")]
        | Annotated[VLLMJudgeSection, Tag("<engine>")],
        Discriminator(lambda value: {"<server>": "<model>"}.get(form := _judge_form(value), form)),
    ] = Field(
        "same",
        description="The judge to teach: 'same' is the run's base; a mapping configures another model. With backend: "
        "vllm, it is taught with transformers and asked through vLLM.",
    )
    prompt: PromptFolder | None = Field(
        None, description="A packaged prompt's name or a prompt folder; null uses that of label."
    )
    contrasts: list[Contrast] = Field(
        default_factory=lambda: list(CONTRASTS),
        description="Kinds of pairs made from pairs.jsonl by spoiling one response; an empty list makes none.",
    )
    max_contrasts: int = Field(400, ge=1, description="Maximum number of contrasts.")
    pairs: DataPath | None = Field(None, description="Pairs that people judged: a file, a folder or a Hub id.")
    labels: Annotated[Text, Named("run_folder")] | None = Field(
        None, description="Folder of a run with another judge's labels: its pairs.jsonl and labels.jsonl are used."
    )
    eval_fraction: Number = Field(
        0.2,
        gt=0,
        le=0.9,
        description="Fraction of the prompts held out, for early stopping and to measure whether teaching helps.",
    )
    evaluations: int = Field(4, ge=1, description="Number of evaluations of the held-out loss during training.")
    patience: int = Field(2, ge=1, description="Stop after this many evaluations without a lower loss.")
    max_length: int | None = Field(
        None, ge=1, description="Maximum question length in tokens; null: the judge's context."
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of transformers.TrainingArguments.")

    @model_validator(mode="after")
    def _has_source(self) -> TeachingSection:
        if not self.contrasts and self.pairs is None and self.labels is None:
            raise ValueError("There is nothing to learn from: name contrasts, pairs or labels.")
        return self
