"""Errors shown to the user: what happened, where, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Places named besides the first for a problem that many rows share.
_PLACES = 3


@dataclass(frozen=True)
class Problem:
    """A problem with the input.

    Args:
        what: The problem, in one sentence.
        where: File and line, row or key, for example ``prompts.jsonl:12``; may be empty.
        fix: How to fix it; empty if it is obvious.
    """

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message} {self.fix}" if self.fix else message


class TrlRlaifError(Exception):
    """Base class of errors that are shown as a message instead of a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, fix),)
        super().__init__(str(self))

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> TrlRlaifError:
        """An error that reports several problems together."""
        first = problems[0]
        error = cls(first.what, where=first.where, fix=first.fix)
        error.problems = tuple(problems)
        error.args = (str(error),)
        return error

    def __str__(self) -> str:
        alike: dict[tuple[str, str], list[Problem]] = {}
        for problem in dict.fromkeys(self.problems):
            alike.setdefault((problem.what, problem.fix), []).append(problem)
        return "\n".join(line for problems in alike.values() for line in _told_once(problems))


def _told_once(problems: Sequence[Problem]) -> Iterator[str]:
    """The first of several problems that differ only in their place, and the places of the others."""
    first, *others = problems
    yield str(first)
    if others:
        more = f" and {len(others) - _PLACES:,} more" if len(others) > _PLACES else ""
        yield f"    The same at {', '.join(problem.where for problem in others[:_PLACES])}{more}."


class UserError(TrlRlaifError):
    """Invalid input: recipe, data, path or option. Exit code 2."""

    exit_code = 2


class RunError(TrlRlaifError):
    """The run failed although its input is valid. Exit code 1."""


class Interrupted(TrlRlaifError):
    """The user stopped the run. Exit code 130, as in a shell after Ctrl-C."""

    exit_code = 130
