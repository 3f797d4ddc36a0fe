"""Types of values in a recipe, and their validators."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    InstanceOf,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError, core_schema

from trl_rlaif.errors import UserError
from trl_rlaif.judging.weights import check_weight

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ComponentRef:
    """A reference to a plugin's component in a recipe: ``name`` or ``{name: {option: value}}``.

    Args:
        name: Its registered name.
        options: Its validated options with defaults, as plain data.
        where: Its place in the recipe, for later messages.
        files: The options of type DataPath, which name data.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    files: tuple[str, ...] = field(default=(), compare=False)


class ComponentLookup(Protocol):
    """A recipe's view of the installed plugins.

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
    """Convert ``1e-5``, which YAML 1.1 reads as text because it lacks a dot, to a number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def safe_name(value: str) -> str:
    """Reject a name that is not a valid folder name on every platform."""
    if not _SAFE_NAME.fullmatch(value):
        raise ValueError("Write up to 100 letters, digits, '.', '_' and '-', a letter or digit first.")
    return value


def name_besides(taken: str, whose: str) -> AfterValidator:
    """Validator for a type: like ``safe_name``, and rejects the name ``taken``."""

    def check(value: str) -> str:
        if value == taken:
            raise ValueError(f"'{taken}' is {whose} name.")
        return safe_name(value)

    return AfterValidator(check)


def exact_weight(value: float) -> float:
    """Reject a weight that cannot be represented exactly."""
    try:
        check_weight(value, "a criterion")
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


def web_address(value: str) -> str:
    """Reject an invalid address."""
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, brackets without an address
        good = False
    if not good or re.search(r"\s", value):
        raise ValueError("Write an address such as http://localhost:8000/v1.")
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
        description="Variables of the chat template, such as {enable_thinking: false} or {reasoning_effort: low}.",
    ),
]


@dataclass(frozen=True)
class Named:
    """Marks a text that names something outside the recipe, to be replaced by the resolved name.

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
    """Base of all sections: unknown keys are rejected, no value is silently converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
