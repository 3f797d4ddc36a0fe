"""Shared by all contract checks: failure messages, fresh instances, options, equality of nested records."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from trl_rlaif.components import Component, Options
from trl_rlaif.errors import UserError
from trl_rlaif.validation import ContractViolation

C = TypeVar("C", bound=Component)
T = TypeVar("T")


class Subject:
    """A component under test: creates instances with the same options, and reports failures.

    Args:
        component: An instance, or a class whose options all have defaults.
        base: The required base class.
    """

    def __init__(self, component: Any, base: type[Component]) -> None:
        self.cls: Any = component if isinstance(component, type) else type(component)
        self.name = self.cls.__name__
        if not issubclass(self.cls, base):
            self.fail(f"is not a trl_rlaif.{base.__name__}", f"Write class {self.name}({base.__name__}).")
        self._check_options_model()
        if isinstance(component, type):
            self.options: dict[str, Any] = {}
        elif isinstance(getattr(component, "options", None), Options):
            options = component.options
            self.options = {name: getattr(options, name) for name in options.model_fields_set}
        else:
            self.fail("has no options", "Call super().__init__(**options) in __init__.")

    def fail(self, what: str, fix: str) -> NoReturn:
        """Raise AssertionError with the component, the problem and the fix."""
        raise AssertionError(f"{self.name}: {what}. {fix}")

    @contextmanager
    def rules(self, where: str) -> Iterator[None]:
        """Report a contract violation (``trl_rlaif.validation``) in the block as a failure of ``where``."""
        try:
            yield
        except ContractViolation as violation:
            self.fail(f"{where} {violation.what}", violation.fix)

    def fresh(self) -> Any:
        """A new instance with the same options, created as for a recipe."""
        try:
            return self.cls(**self.options)
        except ValidationError as error:
            raise AssertionError(
                f"{self.name}: cannot be made without options: {error}. Pass an instance with its options to the check."
            ) from error
        except TypeError as error:
            raise AssertionError(
                f"{self.name}: cannot be made from its options alone, as a recipe does: {error}. "
                "Give every other argument of __init__ a default, and pass **options on to super().__init__."
            ) from error

    def call(self, where: str, function: Callable[[], T], *, may_refuse: bool = False) -> Any:
        """Call a function of the component and return its result; an exception is a failure.

        Args:
            where: The function and its arguments, in words.
            function: Calls it.
            may_refuse: Accept a UserError, which tells the user what to change; the result is then None.
        """
        try:
            return function()
        except AssertionError:
            raise
        except Exception as error:
            if may_refuse and isinstance(error, UserError):
                return None
            raise AssertionError(
                f"{self.name}: {where} raises {type(error).__name__}: {error}. "
                "Make it cope, or raise trl_rlaif.UserError where the user can change it."
            ) from error

    def _check_options_model(self) -> None:
        model = self.cls.Options
        if not (isinstance(model, type) and issubclass(model, Options)):
            self.fail(f"its Options are {model!r}", "Set Options to a subclass of trl_rlaif.Options.")
        if model.model_config.get("extra") != "forbid":
            self.fail("takes options that it does not know", 'Leave model_config\'s extra at "forbid".')
        if not model.model_config.get("frozen"):
            self.fail("has options that can change later", "Leave model_config's frozen at True.")


def same(first: Any, second: Any) -> bool:
    """Whether two nested records are bitwise equal; NaN equals NaN."""
    import numpy as np
    import torch

    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype
        return alike and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return first.shape == second.shape and bool(np.array_equal(first, second, equal_nan=first.dtype.kind == "f"))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return all(same(getattr(first, name), getattr(second, name)) for name in names)
    if isinstance(first, float) and math.isnan(first):
        return math.isnan(second)
    return bool(first == second)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch within the block, and restore their states afterwards."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
