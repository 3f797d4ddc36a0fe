"""The sections of a recipe as typed models: every key with its default, range and description."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    InstanceOf,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from trl_rlaif.algorithms import ALGORITHMS
from trl_rlaif.data import COLUMNS, PairFormat, ScoredPairs
from trl_rlaif.errors import UserError
from trl_rlaif.judging.weights import check_weight
from trl_rlaif.recipe.formatting import nearest_or_all, shown
from trl_rlaif.teaching import KINDS as CONTRASTS
from trl_rlaif.teaching import Contrast

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# Whose columns may be named apart: the keys of ``data``, and data that other sections name.
SOURCES = ("prompts", "eval_prompts", "pairs", "sft", "judge", "calibration", "rehearsal")

# The name of an evaluated set whose prompts the start is good at.
FORGET_SET = "forget"

# Keys of ``rl`` that decide when failing rewards stop a run, and change nothing of what it learns. A stopped run may be
# resumed with other values.
STOPPING_LIMITS = ("max_failed", "reward_timeout")

# Ways to compute the same numbers with less work; see trl_rlaif.models.kernels.
Kernel = Literal["packing", "fused_lora", "logprob_head", "cpu_attention", "cast_weights", "static_cache"]
KERNELS = get_args(Kernel)


@dataclass(frozen=True)
class ComponentRef:
    """A plugin's component as a recipe picks it: ``name`` or ``{name: {option: value}}``.

    Args:
        name: The name it is registered by.
        options: Its options, validated, defaults filled in, as plain data.
        where: The place in the recipe, for later messages.
        files: The options that name data, of the type DataPath.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    files: tuple[str, ...] = field(default=(), compare=False)


class ComponentLookup(Protocol):
    """What a recipe needs to know of the installed plugins.

    Kinds are ``labeler``, ``reward_transform``, ``data_selector`` and ``pair_sampler``.
    """

    def names(self, kind: str) -> list[str]:
        """The names of all installed components of a kind."""
        ...

    def options_model(self, kind: str, name: str) -> type[BaseModel]:
        """The model of a component's options; it forbids unknown keys."""
        ...

    def rewards(self) -> list[str]:
        """The names of all labelers that score single responses."""
        ...


def text_as_number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-5`` as text, because it wants a dot; it is taken as the number it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def safe_name(value: str) -> str:
    """Refuse what could not be a folder's name everywhere."""
    if not _SAFE_NAME.fullmatch(value):
        raise ValueError("Write up to 100 letters, digits, '.', '_' and '-', a letter or digit first.")
    return value


def compared_name(value: str) -> str:
    """As ``safe_name``; the main labeler's own name is taken."""
    if value == "label":
        raise ValueError("'label' is the main labeler's name.")
    return safe_name(value)


def exact_weight(value: float) -> float:
    """Refuse a weight that cannot be counted exactly."""
    try:
        check_weight(value, "a criterion")
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


def judge_name(value: str) -> str:
    """As ``safe_name``; the main judge's own name is taken."""
    if value == "judge":
        raise ValueError("'judge' is the main judge's name.")
    return safe_name(value)


def web_address(value: str) -> str:
    """Refuse what no request can be sent to."""
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets without an address
        good = False
    if not good or re.search(r"\s", value):
        raise ValueError("Write an address such as http://localhost:8000/v1.")
    return value


def one_weight(value: str | dict[str, float]) -> str | dict[str, float]:
    """Refuse an entry of ``rl.rewards`` that names several rewards, or none."""
    if isinstance(value, dict) and len(value) != 1:
        raise ValueError("Write each reward as an entry of its own: [{reward: 1.0}, {direct: 0.5}].")
    return value


def reward_name(entry: Any) -> Any:
    """The reward that an entry of ``rl.rewards`` names: ``name`` or ``{name: weight}``."""
    return next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else entry


def reward_weight(entry: str | dict[str, float]) -> float:
    """The weight of an entry of ``rl.rewards``."""
    return 1.0 if isinstance(entry, str) else next(iter(entry.values()))


def distinct_rewards(entries: list[str | dict[str, float]]) -> list[str | dict[str, float]]:
    """Refuse a reward that is listed twice: each has one weight."""
    weights: dict[str, list[float]] = {}
    for entry in entries:
        weights.setdefault(reward_name(entry), []).append(reward_weight(entry))
    for name, given in weights.items():
        if len(given) > 1:
            raise ValueError(f"{shown(name)} is listed {len(given)} times. Write it once: {{{name}: {sum(given):g}}}.")
    return entries


def some_weight(entries: list[str | dict[str, float]]) -> list[str | dict[str, float]]:
    """Refuse weights with which every score is 0."""
    if not any(map(reward_weight, entries)):
        raise ValueError(
            "Every reward has the weight 0, which only logs it. Give at least one of them another weight: "
            f"[{{{reward_name(entries[0])}: 1.0}}]."
        )
    return entries


def known_columns(value: dict[str, str | dict[str, str]]) -> dict[str, str | dict[str, str]]:
    """Refuse names under which nothing is read."""
    for key, column in value.items():
        if (key in SOURCES) != isinstance(column, dict):
            raise ValueError(f"'{key}' is {shown(column)}. " + nearest_or_all(key, COLUMNS, "Names that are read"))
        for name in column if isinstance(column, dict) else [key]:
            if name not in COLUMNS:
                raise ValueError(f"Nothing is read as '{name}'. " + nearest_or_all(name, COLUMNS, "Names"))
    return value


Number = Annotated[float, BeforeValidator(text_as_number)]
SafeName = Annotated[str, AfterValidator(safe_name)]
Text = Annotated[str, Field(min_length=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4"]
Component = InstanceOf[ComponentRef]
TemplateKwargs = Annotated[
    dict[str, Any],
    Field(
        default_factory=dict,
        description="Variables for its chat template, such as {enable_thinking: false} or {reasoning_effort: low}.",
    ),
]


@dataclass(frozen=True)
class Named:
    """Marks a text that names something outside of the recipe, to be replaced by what the parser finds for it.

    Args:
        kind: The method of ``paths.PathFinder`` that looks it up.
    """

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_before_validator_function(self._found, handler(source))

    def _found(self, value: Any, info: ValidationInfo) -> Any:
        if info.context is None or not isinstance(value, str) or not value:
            return value
        try:
            return getattr(info.context, self.kind)(value)
        except UserError as error:
            problem = error.problems[0]
            raise PydanticCustomError("not_found", "{what}", {"what": problem.what, "fix": problem.fix}) from None


DataPath = Annotated[Text, Named("data")]
ModelPath = Annotated[Text, Named("model")]
PromptFolder = Annotated[Text, Named("prompt")]
Reward = Annotated[Text, Named("reward")]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, no value is silently converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """``run``: the run as a whole."""

    name: SafeName = Field(description="The run's name and its folder's. Default: the recipe file's name.")
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Seed of everything that is drawn at random.")
    kernels: dict[Kernel, Literal["auto"] | bool] = Field(
        default_factory=dict, description=f"Faster ways to compute, each on, off or auto: {', '.join(KERNELS)}."
    )


class LoraSection(Section):
    """``model.lora``: the adapters that are trained."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="LoRA's alpha; updates are scaled by alpha / r.")
    dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapters.")
    target_modules: Text | list[Text] = Field(
        "all-linear", description="Module names that get an adapter, or 'all-linear'."
    )


class ModelSection(Section):
    """``model``: the starting policy, which is the base that all roles share."""

    path: ModelPath = Field(description="A Hub id, a model folder, a .gguf file or package:NAME, which holds one.")
    dtype: Dtype = Field(
        "auto", description="Type of the weights; auto: bfloat16 where the machine computes it fast, else float32."
    )
    quantization: Quantization = Field("none", description="nf4 loads the base in 4 bits with bitsandbytes.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapters that are trained.")
    reasoning: Literal["strip", "keep"] = Field(
        "strip", description="Whether rewards, judges and reports see a response without its reasoning, or with it."
    )
    reasoning_tags: list[Text] | None = Field(
        None, min_length=2, max_length=2, description="What reasoning begins and ends with; null: by the chat template."
    )
    matmul_precision: Literal["auto", "highest", "high", "medium"] = Field(
        "auto",
        description="torch.set_float32_matmul_precision: high and medium allow TF32 and bfloat16; auto: high beside "
        "16-bit weights on a GPU, else highest.",
    )
    chat_template_kwargs: TemplateKwargs


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


class ServerJudgeSection(Section):
    """A judge on an OpenAI-compatible server."""

    backend: Literal["openai"] = Field(description="openai: any server that speaks OpenAI's protocol.")
    path: Text = Field(description="The model's name on the server.")
    base_url: Annotated[Text, AfterValidator(web_address)] | None = Field(
        None, description="The server, such as http://localhost:8000/v1; null is OpenAI."
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
    concurrency: int = Field(8, ge=1, description="Requests at once.")
    timeout: Number = Field(60.0, gt=0, description="Seconds that a request may take.")
    max_retries: int = Field(6, ge=0, description="Times that a failed request is sent again, with growing waits.")
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
    if isinstance(value, ServerJudgeSection) or (isinstance(value, dict) and value.get("backend") == "openai"):
        return "<server>"
    return "<model>" if isinstance(value, dict | JudgeSection) else "<own>"


Judge = Annotated[
    Annotated[Literal["same", "taught"], Tag("<own>")]
    | Annotated[JudgeSection, Tag("<model>")]
    | Annotated[ServerJudgeSection, Tag("<server>")],
    Discriminator(_judge_form),
]
_JUDGES = "'same' asks the run's own base, 'taught' what the stage judge made of it; a mapping names another model."


class DataSection(Section):
    """``data``: what the run reads."""

    prompts: DataPath | None = Field(None, description="Prompts to train on: a file, a folder or a Hub id.")
    max_prompts: int | None = Field(None, ge=1, description="Train on the first so many prompts; null takes all.")
    eval_prompts: DataPath | None = Field(None, description="Prompts to evaluate on, likewise.")
    pairs: DataPath | None = Field(None, description="Pairs of responses that stand in for sampled ones.")
    format: PairFormat = Field("auto", description="How the pairs are laid out; auto looks at their columns.")
    scored_pairs: ScoredPairs = Field(
        "all", description="Pairs of responses with scores: all, or best_worst, the best against the worst."
    )
    columns: Annotated[dict[str, Text | dict[str, Text]], AfterValidator(known_columns)] = Field(
        default_factory=dict,
        description="What the files call their columns, such as {prompt: question}; of one of them alone, "
        "{eval_prompts: {prompt: text}}.",
    )
    category: Text = Field("category", description="The column that holds each prompt's category.")
    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="Prompts without categories get so many, clusters of their embeddings; auto: by silhouette."
    )

    @model_validator(mode="after")
    def _one_category(self) -> DataSection:
        if self.category != "category" and any("category" in self.columns_of(source) for source in SOURCES):
            raise ValueError("Set category or columns.category, not both.")
        return self

    def columns_of(self, source: str) -> dict[str, str]:
        """What a source's file calls the columns.

        Args:
            source: One of SOURCES.
        """
        for_all = {key: column for key, column in self.columns.items() if isinstance(column, str)}
        return for_all | dict(self.columns.get(source, {}))


class SftSection(Section):
    """``sft``: supervised fine-tuning before everything else. Other keys are SFTConfig's."""

    data: DataPath = Field(description="What to fine-tune on: a file, a folder or a Hub id.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of trl.SFTConfig.")


class SampleSection(Section):
    """``sample``: responses of the starting policy, drawn in pairs."""

    sampler: Component | None = Field(
        None, description="A plugin that makes the pairs, with its options; null draws num_responses to each prompt."
    )
    num_responses: int = Field(2, ge=2, description="Responses drawn for each prompt.")
    temperature: Number = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Nucleus sampling: the share of probability kept.")
    max_new_tokens: int = Field(128, ge=1, description="Longest response in tokens.")
    batch_size: int = Field(16, ge=1, description="Sequences generated at once.")
    redraws: int = Field(3, ge=0, description="Times that identical or empty responses are drawn anew.")
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="Seed of sampling; null takes run.seed.")
    keep_pairs: Literal["first", "all"] = Field(
        "first", description="Pairs of a prompt's different responses: the first two, or each with each."
    )

    @property
    def pairs_a_prompt(self) -> int:
        """How many pairs a prompt's responses make, where all of them are different."""
        return math.comb(self.num_responses, 2) if self.keep_pairs == "all" else 1


class TeachingSection(Section):
    """``judge``: an adapter that teaches a judge, from pairs whose better response is known. Other keys are
    TrainingArguments'."""

    model: Annotated[
        Annotated[Literal["same"], Tag("<own>")] | Annotated[JudgeSection, Tag("<model>")],
        Discriminator(lambda value: "<model>" if isinstance(value, dict | JudgeSection) else "<own>"),
    ] = Field("same", description="The judge to teach: 'same' is the run's own base; a mapping names another model.")
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


class CriterionSection(Section):
    """One of several criteria that pairs are labeled by."""

    description: Text | None = Field(None, description="What the judge is told of it; null: its name.")
    weight: Annotated[Number, AfterValidator(exact_weight)] = Field(
        1.0, gt=0, description="What it counts beside the others, with up to two decimals."
    )
    veto: bool = Field(False, description="Whether it must hold, asked as yes or no of each response.")


class ComparedSection(Section):
    """Another labeler beside the main one; what it leaves out is the main one's."""

    labeler: Component | None = Field(None, description="The labeler, with its options.")
    judge: Judge | None = Field(None, description="The judge.")
    prompt: PromptFolder | None = Field(None, description="A packaged prompt's name, or a prompt folder.")


class RankingSection(Section):
    """``label.ranking``: each prompt's responses in order, by a Bradley-Terry model of what the judge answers."""

    method: Literal["tournament", "all_pairs"] = Field(
        description="tournament: ask what is most uncertain after the answers so far; all_pairs: ask about every pair."
    )
    questions: int | None = Field(
        None,
        ge=1,
        description="A tournament's questions about a prompt, each about a pair in one order; null: a third of all.",
    )
    at_once: int = Field(
        1, ge=1, description="Questions about a prompt in a tournament's round; more make fewer rounds that know less."
    )
    confidence: Number = Field(
        0.95,
        ge=0.5,
        le=1,
        description="A tournament is done with a prompt once each of its pairs is in order with this probability.",
    )


class JurySection(Section):
    """``label.jury``: the main labeler and those of ``label.compare`` label together."""

    join: Literal["log_odds", "dawid_skene"] = Field(
        "log_odds",
        description="log_odds: mean of the members' log-odds, weighted by their agreement with the others; "
        "dawid_skene: posterior of members who err independently, each at a rate of its own.",
    )
    max_disagreement: Number | None = Field(
        None,
        ge=0,
        le=0.5,
        description="Pairs whose votes have a greater standard deviation, or fewer than two votes, are left out.",
    )


class LabelSection(Section):
    """``label``: preferences from a judge."""

    labeler: Component = Field(ComponentRef("distilled"), description="The labeler, with its options.")
    judge: Judge = Field("same", description=_JUDGES)
    prompt: PromptFolder = Field("general", description="A packaged prompt's name, or a prompt folder.")
    criteria: dict[SafeName, Annotated[Number, Field(gt=0), AfterValidator(exact_weight)] | CriterionSection] = Field(
        default_factory=dict,
        description="Criteria in place of one question, each asked by itself: a weight, or {description: ..., "
        "weight: 1, veto: false}; for labelers with the option criteria.",
    )
    batch_tokens: int = Field(2048, ge=1, description="Tokens that the judge computes at once.")
    precision: Literal["auto", "highest", "high", "medium"] = Field(
        "auto", description="Of float32 matrix products; auto takes the fastest that leaves labels within 1e-4."
    )
    min_confidence: Number = Field(0.5, ge=0.5, le=1, description="Pairs whose label is less sure are left out.")
    calibration: DataPath | None = Field(
        None,
        description="Pairs that people judged (20 or more): labels are calibrated on them, if cross-validation shows "
        "that it helps.",
    )
    ranking: RankingSection | None = Field(
        None, description="Rank each prompt's responses; its pairs get the probabilities that follow from the ranking."
    )
    compare: dict[Annotated[str, AfterValidator(compared_name)], ComparedSection] = Field(
        default_factory=dict, description="More labelers by name: the report compares them with the main one."
    )
    jury: JurySection | None = Field(
        None, description="The main labeler and those of compare label together; without it the main one labels alone."
    )

    @model_validator(mode="after")
    def _judged(self) -> LabelSection:
        if self.criteria and all(isinstance(of, CriterionSection) and of.veto for of in self.criteria.values()):
            raise ValueError("Every one of the criteria is a veto. Give at least one that responses are judged by.")
        return self

    @property
    def main_labeler(self) -> ComponentRef:
        """The labeler with the criteria among its options."""
        if not self.criteria:
            return self.labeler
        criteria = {
            name: of.model_dump()
            if isinstance(of, CriterionSection)
            else CriterionSection.model_validate({"weight": of}).model_dump()
            for name, of in self.criteria.items()
        }
        return replace(self.labeler, options={**self.labeler.options, "criteria": criteria})


class RewardSection(Section):
    """``reward``: the reward model. Other keys are RewardConfig's."""

    transforms: list[Component] = Field(default_factory=list, description="Reward transforms, in order.")
    eval_fraction: Number = Field(
        0.1, ge=0, le=0.9, description="Share of the preferences held out, all pairs of a prompt together."
    )
    policies: list[Annotated[Text, Named("policy")]] = Field(
        default_factory=list,
        description="Who else wrote the responses: adapter folders, or 'base'. Their likelihoods become the importance "
        "weights of 'advantage'.",
    )
    packing: bool | None = Field(
        None, description="A pair is one row, its prompt computed once; null does so where the model allows it."
    )
    batch_tokens: int = Field(8192, ge=1, description="Tokens of packed pairs that are computed at once.")
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of trl.RewardConfig.")


class RlSection(Section):
    """``rl``: reinforcement learning. Other keys are PPOConfig's; those of TRL's
    configuration, too, where ``algorithm`` is a trainer of TRL's."""

    algorithm: Literal[tuple(ALGORITHMS)] = Field(  # type: ignore[valid-type]
        "ppo",
        description="'reinforce' is PPO with one pass over each batch and no clipped ratio (Lee et al. 2023); what "
        "it presets, other keys here override. 'rloo' and 'grpo' are TRL's own trainers, with the rewards, transforms "
        "and selectors named here. 'rejection_sampling' fine-tunes on what the selectors accept of the policy's "
        "responses (Dong et al. 2023), num_train_epochs times, with num_ppo_epochs passes each. 'dpo' is TRL's "
        "DPOTrainer on the preferences (Rafailov et al. 2023): no rewards, no sampling; its beta is kl_coef.",
    )
    rewards: Annotated[
        list[Annotated[Reward | dict[Reward, Number], AfterValidator(one_weight)]],
        AfterValidator(distinct_rewards),
        AfterValidator(some_weight),
    ] = Field(
        default_factory=lambda: ["reward"], min_length=1,
        description="What gives rewards: 'reward' (the reward model), a labeler such as 'direct' or 'rubric' (the "
        "judge), module:function; with weights [{reward: 1.0}, {direct: 0.5}]; the weight 0 only logs a reward.",
    )  # fmt: skip
    labelers: list[Component] = Field(
        default_factory=list,
        description="Options of labelers in rewards, such as [{rubric: {column: checks}}]; of others, label.labeler's.",
    )
    transforms: list[Component] = Field(default_factory=list, description="Reward transforms, in order.")
    selectors: list[Component] = Field(default_factory=list, description="Data selectors, in order.")
    rehearsal: DataPath | None = Field(
        None,
        description="Prompts with completions of your own to rehearse: a file, a folder or a Hub id.",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Fields of PPOConfig.")

    @property
    def reward_names(self) -> list[str]:
        """The rewards without their weights."""
        return [reward_name(entry) for entry in self.rewards]

    @property
    def reward_weights(self) -> list[float] | None:
        """Their weights, in the order of PPOConfig's: the reward model first. None where the recipe gives none."""
        if all(isinstance(entry, str) for entry in self.rewards):
            return None
        entries = sorted(self.rewards, key=lambda entry: reward_name(entry) != "reward")
        return [reward_weight(entry) for entry in entries]


class FurtherJudgeSection(Section):
    """Another judge beside the main one; what it leaves out is the main one's."""

    judge: Judge | None = Field(None, description="The judge.")
    prompt: PromptFolder | None = Field(None, description="A packaged prompt's name, or a prompt folder.")

    @model_validator(mode="after")
    def _differs(self) -> FurtherJudgeSection:
        if self.judge is None and self.prompt is None:
            raise ValueError("Name its judge, its prompt or both: it would be the main judge.")
        return self


class EvaluateSection(Section):
    """``evaluate``: the trained policy against the start."""

    judge: Judge = Field("same", description=_JUDGES)
    prompt: PromptFolder | None = Field(None, description="A prompt as in label; null takes label's.")
    judges: dict[Annotated[str, AfterValidator(judge_name)], FurtherJudgeSection] = Field(
        default_factory=dict,
        description="More judges by name, asked one after the other: how far they agree is measured.",
    )
    harmless: Annotated[Text, Named("rating_prompt")] | None = Field(
        None,
        description="A prompt, such as harmlessness, with which the judge rates both responses from 1 to 10: the share "
        "above the middle is the harmless rate. null measures none.",
    )
    sets: dict[SafeName, DataPath] = Field(
        default_factory=dict, description="Prompts by name; empty takes data.eval_prompts as 'test'."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest response in tokens; null takes rl.response_length or sample's."
    )
    temperature: Number = Field(0.0, ge=0, description="Sampling temperature; 0 decodes greedily.")
    num_responses: int = Field(
        1, ge=1, description="Responses a prompt of each policy: rewards are means over all, the first is judged."
    )
    batch_size: int = Field(16, ge=1, description="Sequences generated or judged at once.")
    track_every: int | None = Field(
        None,
        ge=0,
        description="Updates of rl between measurements of the sets while it runs; 0: none; null: ten over the run, "
        f"where there is a set '{FORGET_SET}'.",
    )
    track_prompts: int = Field(64, ge=1, description="Prompts of each set that these measure, drawn at random.")
    stop_on_forgetting: Number | None = Field(
        None,
        ge=0,
        lt=0.5,
        description=f"rl ends when the win rate against the start on the set '{FORGET_SET}' falls below 0.5 less this.",
    )


class ReportSection(Section):
    """``report``: one HTML page at the end. It has no keys."""


class RoundsSection(Section):
    """``rounds``: sample, label, reward and rl again and again, each time with the policy that was trained last."""

    number: int = Field(1, ge=1, description="How many rounds; rounds: 3 is short for rounds: {number: 3}.")
    previous: Annotated[Text, Named("trained_run")] | None = Field(
        None,
        description="A run's folder: this run is the round after it, with its policy, reward model and taught judge.",
    )
    reference: Literal["initial", "previous"] = Field(
        "initial",
        description="What rl compares the policy with: the policy before the first round, or the one that the present "
        "round begins with.",
    )
    earlier: Number = Field(
        0.5, ge=0, le=1, description="Share of the earlier rounds' preferences that the reward model learns from again."
    )

    @model_validator(mode="after")
    def _repeats(self) -> RoundsSection:
        if "number" not in self.model_fields_set and self.previous is None:
            raise ValueError("Write how many rounds, such as number: 3, or the run before this one as previous.")
        return self

    @property
    def repeats(self) -> bool:
        """Whether there are several rounds, or one after another run."""
        return self.number > 1 or self.previous is not None


STAGE_SECTIONS: dict[str, type[Section]] = {
    "sft": SftSection,
    "sample": SampleSection,
    "judge": TeachingSection,
    "label": LabelSection,
    "reward": RewardSection,
    "rl": RlSection,
    "evaluate": EvaluateSection,
    "report": ReportSection,
}

SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "rounds": RoundsSection,
    **STAGE_SECTIONS,
}

# In order; trl_rlaif.pipeline.stages says what each is.
STAGES = tuple(STAGE_SECTIONS)


def plain(value: Any) -> Any:
    """A section, or any value in one, as data that ``yaml.safe_dump`` writes and a recipe can hold again."""
    if isinstance(value, ComponentRef):
        return {value.name: plain(value.options)} if value.options else value.name
    if isinstance(value, BaseModel):
        keys = {name: plain(getattr(value, name)) for name in type(value).model_fields if name != "config"}
        return {**keys, **plain(getattr(value, "config", {}))}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
