"""What keys of a recipe may hold: types of values, and what they refuse."""

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


def name_besides(taken: str, whose: str) -> AfterValidator:
    """Of a type: as ``safe_name``, and refuse a name that is taken already."""

    def check(value: str) -> str:
        if value == taken:
            raise ValueError(f"'{taken}' is {whose} name.")
        return safe_name(value)

    return AfterValidator(check)


def exact_weight(value: float) -> float:
    """Refuse a weight that cannot be counted exactly."""
    try:
        check_weight(value, "a criterion")
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


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
