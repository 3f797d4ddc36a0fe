"""Errors that name the component that failed, its distribution and its place in the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from trl_rlaif.errors import RunError, TrlRlaifError, UserError
from trl_rlaif.interrupts import is_fault

if TYPE_CHECKING:
    from trl_rlaif.plugins import Registered

# Attribute of a component, or a reward function, with its Origin.
ORIGIN = "_trl_rlaif_origin"
_RESUME = "Finished work is kept: once this is fixed, continue with --resume."


class ContractViolation(Exception):
    """A component broke its contract.

    Args:
        what: The violation, to follow the component's name: ``returns a list``.
        fix: What its author should write instead.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class ComponentError(RunError):
    """A component that a recipe names broke its contract or raised; the recipe is valid, so the exit code is 1."""


class RewardError(ComponentError, UserError):
    """The same for a reward. Also a UserError: if a reward raises one, the trainers save their progress."""

    exit_code = RunError.exit_code


@dataclass(frozen=True)
class Origin:
    """The identity of a component or a reward function.

    Args:
        who: In words, with its distribution: ``labeler 'words' of my-words 0.1.0``.
        where: The place in the recipe.
        picked: Whether a recipe picked it; its exceptions then end the run with a message. Otherwise it belongs to the
            caller's own code: its exceptions propagate unchanged, and a broken contract is a UserError.
    """

    who: str
    where: str = ""
    picked: bool = True

    @classmethod
    def of(cls, found: Registered, where: str) -> Origin:
        """The origin of a registered component."""
        kind = found.kind.replace("_", " ")
        return cls(f"{kind} '{found.name}' of {found.distribution} {found.version}".rstrip(), where)

    def error(self, what: str, fix: str, kind: type[ComponentError] = ComponentError) -> TrlRlaifError:
        """The error that ends the run."""
        if not self.picked:
            return UserError(f"The {self.who} {what}.", fix=fix)
        return kind(f"The {self.who} {what}.", where=self.where, fix=f"{fix} {_RESUME}")

    @contextmanager
    def blamed(self, method: str, kind: type[ComponentError] = ComponentError) -> Iterator[None]:
        """Turn exceptions raised within into errors that name this origin.

        Raises:
            ComponentError: With the component's own exception as cause. A TrlRlaifError keeps its type and message,
                and gets the place in the recipe.
        """
        try:
            yield
        except ContractViolation as violation:
            raise self.error(violation.what, violation.fix, kind) from None
        except TrlRlaifError as error:
            if self.where and not any(problem.where for problem in error.problems):
                error.problems = tuple(replace(problem, where=self.where) for problem in error.problems)
                error.args = (str(error),)
            raise
        except BaseException as error:
            # Closing a generator of labels early is not a fault.
            if not self.picked or isinstance(error, GeneratorExit) or not is_fault(error):
                raise
            what = f"failed in {method}: {type(error).__name__}: {error}".rstrip(".: ")
            raise self.error(what, "Add --debug after trl-rlaif for the traceback.", kind) from error


def origin_of(subject: Any, kind: str) -> Origin:
    """The origin of a component or function; one that no recipe picked is named by its class or name."""
    name = getattr(subject, "__name__", None)
    who = f"{kind} '{name}'" if isinstance(name, str) else f"{kind} {type(subject).__name__}"
    return getattr(subject, ORIGIN, None) or Origin(who, picked=False)


def tagged(function: Any, origin: Origin) -> Any:
    """A wrapped reward function that knows its origin; the user's own is unchanged."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    call.__name__ = getattr(function, "__name__", type(function).__name__)
    setattr(call, ORIGIN, origin)
    return call
