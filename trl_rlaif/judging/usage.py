"""Usage of a judge on a server: tokens as the server counts them, their cost, and a budget for both."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from trl_rlaif.errors import RunError


@dataclass(frozen=True)
class Usage:
    """Usage so far.

    Args:
        input_tokens, output_tokens: As the server counts them.
        cost: Of these tokens, in the currency of the price; None if no judge has one. Exact, so that it does not
            depend on the order in which concurrent answers arrive.
        uncounted: Answers without a count.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal | None = None
    uncounted: int = 0

    @property
    def tokens(self) -> int:
        """Input and output tokens."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        costs = [one.cost for one in (self, other) if one.cost is not None]
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            sum(costs, Decimal()) if costs else None,
            self.uncounted + other.uncounted,
        )

    def row(self) -> dict[str, Any]:
        """As in a JSON file; ``of_row`` reads it."""
        return asdict(self) | {"cost": None if self.cost is None else float(self.cost)}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Usage:
        """From a JSON file; an empty row is no usage."""
        cost = row.get("cost")
        # A float of up to 15 digits is the shortest text that reads back as it: nothing is lost in a file.
        return cls(**{**row, "cost": None if cost is None else Decimal(str(cost))})


@dataclass(frozen=True)
class Price:
    """Price per million tokens."""

    input: float
    output: float

    def of(self, read: int, written: int) -> Decimal:
        """The price of so many input and output tokens, exact for the prices as the recipe writes them."""
        return (read * Decimal(str(self.input)) + written * Decimal(str(self.output))) / 1_000_000


@dataclass(frozen=True)
class Budget:
    """Limits on usage; None: unlimited."""

    tokens: int | None = None
    cost: float | None = None


class BudgetUsedUp(RunError):
    """The run can be resumed with a larger budget."""


class Total:
    """Total usage of several judges; thread-safe.

    Args:
        used: The initial usage.
    """

    def __init__(self, used: Usage = Usage()) -> None:
        self.used, self._lock = used, threading.Lock()

    def add(self, used: Usage) -> None:
        """Add to the total."""
        with self._lock:
            self.used += used


class Meter:
    """Counts the usage of a judge's answers.

    Args:
        price: Of the judge's tokens.
        budget: No further question is started once the total has reached it; those in progress are finished.
        total: The total to add to; None: a new one.
    """

    def __init__(self, price: Price | None = None, budget: Budget = Budget(), total: Total | None = None) -> None:
        self.price, self.budget, self.total = price, budget, total or Total()

    @property
    def used(self) -> Usage:
        """The total usage."""
        return self.total.used

    def add(self, usage: Any) -> None:
        """Count the usage of an answer.

        Args:
            usage: OpenAI's object, or None if the server sends none.

        Raises:
            RunError: There is no count, but a budget, which cannot be enforced without one.
        """
        counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        read, written = (count if isinstance(count, int) else 0 for count in counts)
        counted = isinstance(counts[0], int)
        if not counted and self.budget != Budget():
            raise RunError("The judge's server does not report its token usage.", fix="Leave out label.budget.")
        cost = self.price.of(read, written) if self.price else None
        self.total.add(Usage(read, written, cost, int(not counted)))

    @property
    def used_up(self) -> bool:
        """Whether the budget is used up."""
        used, tokens, cost = self.used, self.budget.tokens, self.budget.cost
        return (tokens is not None and used.tokens >= tokens) or (cost is not None and float(used.cost or 0) >= cost)

    def error(self) -> BudgetUsedUp:
        """The error to raise if it is used up and questions are left."""
        used, budget = self.used, self.budget
        tokens = f"{used.tokens:,}" + (f" of {budget.tokens:,}" if budget.tokens else "")
        cost = f", at a cost of {float(used.cost or 0):.4g} of {budget.cost:.4g}" if budget.cost else ""
        return BudgetUsedUp(
            f"label.budget is used up: {tokens} tokens{cost}.",
            fix="Answers so far are kept. Raise label.budget and add --resume to continue.",
        )
