"""What a judge on a server uses: tokens as the server counts them, what they cost, and a budget for both."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from typing import Any

from trl_rlaif.errors import RunError


@dataclass(frozen=True)
class Usage:
    """What was used so far.

    Args:
        input_tokens, output_tokens: As the server counts them.
        cost: Of these tokens, in the currency of the price; 0 without a price.
        uncounted: Answers that came without a count.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    uncounted: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@dataclass(frozen=True)
class Price:
    """Of a million tokens."""

    input: float = 0.0
    output: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What may be used; None is as much as it takes."""

    tokens: int | None = None
    cost: float | None = None


class BudgetUsedUp(RunError):
    """The run may go on with a larger budget."""


class Meter:
    """Adds up what the answers of a judge used, in any number of threads.

    Args:
        price: Of the judge's tokens.
        budget: No further question is begun once it is used up; what is under way is finished.
        used: What counts already.
    """

    def __init__(self, price: Price = Price(), budget: Budget = Budget(), used: Usage = Usage()) -> None:
        self.price, self.budget, self.used = price, budget, used
        self._lock = threading.Lock()

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
            raise RunError("The judge's server does not count tokens (usage).", fix="Leave out label.budget.")
        cost = (read * self.price.input + written * self.price.output) / 1e6
        with self._lock:
            self.used += Usage(read, written, cost, int(not counted))

    @property
    def used_up(self) -> bool:
        """Whether nothing is left of the budget."""
        tokens, cost = self.budget.tokens, self.budget.cost
        total = self.used.input_tokens + self.used.output_tokens
        return (tokens is not None and total >= tokens) or (cost is not None and self.used.cost >= cost)

    def error(self) -> BudgetUsedUp:
        """What to raise once it is used up and something is left to be asked."""
        used, budget = self.used, self.budget
        tokens = f"{used.input_tokens + used.output_tokens:,}" + (f" of {budget.tokens:,}" if budget.tokens else "")
        cost = f", at a cost of {used.cost:.4g} of {budget.cost:.4g}" if budget.cost else ""
        return BudgetUsedUp(
            f"label.budget is used up: {tokens} tokens{cost}.",
            fix="What was answered is kept. Raise label.budget and add --resume to go on.",
        )
