"""Who judges, and the section ``judge``, which teaches one."""

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
    """Refuse what no request can be sent to, and a server that is named twice."""
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
    dtype: Dtype = Field("auto", description="Type of the judge's weights; auto as of model.dtype.")
    quantization: Quantization = Field("none", description="nf4 loads the judge in 4 bits with bitsandbytes.")
    chat_template_kwargs: TemplateKwargs

    def __hash__(self) -> int:
        """By content, so that a judge that is asked twice is loaded once."""
        return hash(self.model_dump_json())


class VLLMJudgeSection(JudgeSection):
    """A judge that is a model of its own on this machine, in vLLM's engine."""

    backend: Literal["vllm"] = Field(description="vllm: the engine of the package vllm, without a server.")
    path: ModelPath = Field(description="The judge's Hub id, model folder, .gguf file or package:NAME.")
    quantization: Literal["none"] = Field("none", description="A checkpoint that is quantized itself is read as it is.")
    gpu_memory_utilization: Number = Field(
        0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM reserves for weights and cache."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that the judge is divided among.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest question in tokens, the answer counted; null is the model's context."
    )
    enforce_eager: bool = Field(False, description="true starts sooner, without compiling, and computes more slowly.")

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        return {name: getattr(self, name) for name in VLLMJudgeSection.model_fields.keys() - JudgeSection.model_fields}


class PriceSection(Section):
    """What a hosted judge costs."""

    input: Number = Field(ge=0, description="Price of a million tokens that the judge reads, in any currency.")
    output: Number = Field(ge=0, description="Price of a million tokens that it writes.")


class ServerJudgeSection(Section):
    """A judge on an OpenAI-compatible server."""

    backend: Literal["openai"] = Field(description="openai: any server that speaks OpenAI's protocol.")
    path: Text = Field(description="The model's name on the server.")
    base_url: Annotated[Text | Annotated[list[Text], Field(min_length=1)] | None, AfterValidator(_addresses)] = Field(
        None,
        description="The server, such as http://localhost:8000/v1, or a list of several that serve the same model; "
        "null is OpenAI.",
    )
    api_key_env: Text = Field("OPENAI_API_KEY", description="The environment variable that holds the key.")
    api: Literal["chat", "completions"] = Field("chat", description="completions asks base models in plain text.")
    prefill: Literal["auto"] | bool = Field(
        "auto",
        description="Whether a chat answer begins with given text (vLLM can); auto finds out by the first question.",
    )
    tolerance: Number = Field(
        0.01, ge=0, le=1, description="How much of an answer may hide behind the likeliest tokens that a server lists."
    )
    top_logprobs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = Field(
        "auto", description="Likeliest tokens to ask for; auto is 20, and 200 once they lack a candidate."
    )
    votes: int = Field(
        0, ge=0, description="Answers to sample where a server gives no log-probabilities; 0 skips the pair."
    )
    concurrency: int = Field(
        8, ge=1, description="Requests at once, on all servers together; fewer on one that is overloaded."
    )
    timeout: Number = Field(60.0, gt=0, description="Seconds that a request may take.")
    max_retries: int = Field(6, ge=0, description="Times that a failed request is sent again, with growing waits.")
    price: PriceSection | None = Field(None, description="What its tokens cost: the report adds it up.")
    chat_template_kwargs: TemplateKwargs
    extra_body: dict[str, Any] = Field(default_factory=dict, description="Further fields of every request's body.")

    def __hash__(self) -> int:
        """By content, so that a judge that is asked twice is connected to once."""
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

JUDGES = "'same' asks the run's own base, 'taught' what the stage judge made of it; a mapping names another model."


class OtherJudgeSection(Section):
    """A judge beside the main one; what it leaves out is the main one's."""

    judge: Judge | None = Field(None, description="The judge.")
    prompt: PromptFolder | None = Field(None, description="A packaged prompt's name, or a prompt folder.")


class TeachingSection(Section):
    """``judge``: an adapter that teaches a judge, from pairs whose better response is known. Other keys are
    TrainingArguments'."""

    model: Annotated[
        Annotated[Literal["same"], Tag("<own>")]
        | Annotated[JudgeSection, Tag("<model>")]
        | Annotated[VLLMJudgeSection, Tag("<engine>")],
        Discriminator(lambda value: {"<server>": "<model>"}.get(form := _judge_form(value), form)),
    ] = Field(
        "same",
        description="The judge to teach: 'same' is the run's own base; a mapping names another model. With backend: "
        "vllm it is taught by transformers and asked in vLLM.",
    )
    prompt: PromptFolder | None = Field(None, description="A prompt as in label; null takes label's.")
    contrasts: list[Contrast] = Field(
        default_factory=lambda: list(CONTRASTS),
        description="Pairs made of the responses in pairs.jsonl, of which one was spoiled; an empty list makes none.",
    )
    max_contrasts: int = Field(400, ge=1, description="Contrasts at most.")
    pairs: DataPath | None = Field(None, description="Pairs that people judged: a file, a folder or a Hub id.")
    labels: Annotated[Text, Named("run_folder")] | None = Field(
        None, description="A run's folder, whose pairs.jsonl and labels.jsonl hold what another judge said."
    )
    eval_fraction: Number = Field(
        0.2, gt=0, le=0.9, description="Share of the prompts held out, to stop in time and to see whether it helps."
    )
    evaluations: int = Field(4, ge=1, description="Times that the loss on what is held out is measured on the way.")
    patience: int = Field(2, ge=1, description="Training ends after so many of these without a lower loss.")
    max_length: int | None = Field(None, ge=1, description="Longest question in tokens; null: the judge's context.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of transformers.TrainingArguments.")

    @model_validator(mode="after")
    def _has_source(self) -> TeachingSection:
        if not self.contrasts and self.pairs is None and self.labels is None:
            raise ValueError("There is nothing to learn from: name contrasts, pairs or labels.")
        return self
