"""What a judge on a server uses: tokens as the server counts them, what they cost, and a budget for both."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from trl_rlaif.errors import RunError


@dataclass(frozen=True)
class Usage:
    """What was used so far.

    Args:
        input_tokens, output_tokens: As the server counts them.
        cost: Of these tokens, in the currency of the price; None where no judge has one.
        uncounted: Answers that came without a count.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    uncounted: int = 0

    @property
    def tokens(self) -> int:
        """Both."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        costs = [one.cost for one in (self, other) if one.cost is not None]
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            sum(costs) if costs else None,
            self.uncounted + other.uncounted,
        )


@dataclass(frozen=True)
class Price:
    """Of a million tokens."""

    input: float
    output: float


@dataclass(frozen=True)
class Budget:
    """What may be used; None is as much as it takes."""

    tokens: int | None = None
    cost: float | None = None


class BudgetUsedUp(RunError):
    """The run may go on with a larger budget."""


class Total:
    """What several judges have used together, in any number of threads.

    Args:
        used: What counts already.
    """

    def __init__(self, used: Usage = Usage()) -> None:
        self.used, self._lock = used, threading.Lock()

    def add(self, used: Usage) -> None:
        """Count more."""
        with self._lock:
            self.used += used


class Meter:
    """Counts what the answers of a judge used.

    Args:
        price: Of the judge's tokens.
        budget: No further question is begun once the total has used it up; what is under way is finished.
        total: What it is added to.
    """

    def __init__(self, price: Price | None = None, budget: Budget = Budget(), total: Total | None = None) -> None:
        self.price, self.budget, self.total = price, budget, total or Total()

    @property
    def used(self) -> Usage:
        """In total."""
        return self.total.used

    def add(self, usage: Any) -> None:
        """Count what an answer used.

        Args:
            usage: OpenAI's object, or None where the server sends none.

        Raises:
            RunError: Without a count, no budget can be kept.
        """
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        read, written = (count if isinstance(count, int) else 0 for count in counts)
        counted = isinstance(counts[0], int)
        if not counted and self.budget != Budget():
            raise RunError("The judge's server does not report its token usage.", fix="Leave out label.budget.")
        cost = None if self.price is None else (read * self.price.input + written * self.price.output) / 1e6
        self.total.add(Usage(read, written, cost, int(not counted)))

    @property
    def used_up(self) -> bool:
        """Whether nothing is left of the budget."""
        used, tokens, cost = self.used, self.budget.tokens, self.budget.cost
        return (tokens is not None and used.tokens >= tokens) or (cost is not None and (used.cost or 0.0) >= cost)

    def error(self) -> BudgetUsedUp:
        """What to raise once it is used up and something is left to be asked."""
        used, budget = self.used, self.budget
        tokens = f"{used.tokens:,}" + (f" of {budget.tokens:,}" if budget.tokens else "")
        cost = f", at a cost of {used.cost or 0.0:.4g} of {budget.cost:.4g}" if budget.cost else ""
        return BudgetUsedUp(
            f"label.budget is used up: {tokens} tokens{cost}.",
            fix="Answers so far are kept. Raise label.budget and add --resume to continue.",
        )
