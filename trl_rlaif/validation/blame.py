"""Who broke a rule or raised: errors that name the component, its distribution and its place in the recipe."""

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

# Where a component, or a reward function, keeps who it is.
ORIGIN = "_trl_rlaif_origin"
_RESUME = "Finished work is kept: once this is fixed, continue with --resume."


class ContractViolation(Exception):
    """A rule that a component broke.

    Args:
        what: What it does, to follow its name: ``returns a list``.
        fix: What its author should write instead.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class ComponentError(RunError):
    """A component that a recipe names broke a rule or raised; the recipe is right, so the exit code is 1."""


class RewardError(ComponentError, UserError):
    """The same of a reward. Also a UserError: on one of those in a reward, the trainers save what was learned."""

    exit_code = RunError.exit_code


@dataclass(frozen=True)
class Origin:
    """Who a component or a reward function is.

    Args:
        who: In words, with its distribution: ``labeler 'words' of my-words 0.1.0``.
        where: The place in the recipe.
        picked: By a recipe; what it raises then ends the run in words. Without one it belongs to the caller's own
            code: it raises what it raises, and a broken rule is a UserError.
    """

    who: str
    where: str = ""
    picked: bool = True

    @classmethod
    def of(cls, found: Registered, where: str) -> Origin:
        """Of a component as it is registered."""
        kind = found.kind.replace("_", " ")
        return cls(f"{kind} '{found.name}' of {found.distribution} {found.version}".rstrip(), where)

    def error(self, what: str, fix: str, kind: type[ComponentError] = ComponentError) -> TrlRlaifError:
        """The error that ends the run."""
        if not self.picked:
            return UserError(f"The {self.who} {what}.", fix=fix)
        return kind(f"The {self.who} {what}.", where=self.where, fix=f"{fix} {_RESUME}")

    @contextmanager
    def blamed(self, method: str, kind: type[ComponentError] = ComponentError) -> Iterator[None]:
        """Turn what is raised within into an error with this name on it.

        Raises:
            ComponentError: With the component's own exception as cause. One that speaks to users already keeps its
                type and words, and is given the place in the recipe.
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
            # A generator that is closed early, and so its labels, is nobody's fault.
            if not self.picked or isinstance(error, GeneratorExit) or not is_fault(error):
                raise
            what = f"failed in {method}: {type(error).__name__}: {error}".rstrip(".: ")
            raise self.error(what, "Add --debug after trl-rlaif for the traceback.", kind) from error


def origin_of(subject: Any, kind: str) -> Origin:
    """Who a component or function is; one that no recipe picked is called by its class or name."""
    name = getattr(subject, "__name__", None)
    who = f"{kind} '{name}'" if isinstance(name, str) else f"{kind} {type(subject).__name__}"
    return getattr(subject, ORIGIN, None) or Origin(who, picked=False)


def tagged(function: Any, origin: Origin) -> Any:
    """A reward function that knows which recipe picked it; the user's own stays as it is."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    call.__name__ = getattr(function, "__name__", type(function).__name__)
    setattr(call, ORIGIN, origin)
    return call
