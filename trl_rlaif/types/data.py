"""Prompts and pairs as they are read and made, and what labelers say of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        id: Unique within its source.
        prompt: A text, or a conversation that ends with the turn to be answered (a user's or a tool's), or with an
            assistant's, which the response continues. Never blank.
        category: The kind of prompt, if the data says.
        extra: The other columns of the row, as they were.
    """

    id: str
    prompt: str | list[Message]
    category: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One prompt with two different, non-blank responses.

    Args:
        id: Unique within its source.
        prompt: A text, or a conversation that ends with the turn to be answered (a user's or a tool's), or with an
            assistant's, which the response continues. Never blank.
        response_1: The first response.
        response_2: The second response. The order says nothing about which one is better.
        category: The kind of prompt, if the data says.
        human: Which response a person preferred: 1 or 2; 0 for a tie; None if unknown.
        extra: The other columns of the row, as they were.
    """

    id: str
    prompt: str | list[Message]
    response_1: str
    response_2: str
    category: str | None = None
    human: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def responses(self) -> tuple[str, str]:
        """Both, in their order."""
        return self.response_1, self.response_2


@dataclass(frozen=True)
class Skip:
    """A row that was left out.

    Args:
        where: The file and line or row.
        reason: A short phrase from a fixed set, for example ``"empty response"``.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What came out of one source: the usable items in the order of the rows, and the rows left out."""

    items: list[T]
    skipped: list[Skip]

    def skip_counts(self) -> dict[str, int]:
        """How many rows were left out for each reason, the most frequent reason first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())


@dataclass(frozen=True)
class CriterionLabel:
    """What a labeler says of a pair by one criterion.

    Args:
        criterion: Its name or its text.
        weight: What it counts in the label; a response that meets a criterion of negative weight is the worse for it.
        p, p_12, p_21: As of Label, by this criterion alone; of one that responses are compared by.
        score_1, score_2: Of one that is asked about each response: the probability in [0, 1] that it is met, or the
            rating as a reward in [-1, 1].
        veto: True of one that must hold; its weight is 0.
    """

    criterion: str
    weight: float
    p: float | None = None
    p_12: float | None = None
    p_21: float | None = None
    score_1: float | None = None
    score_2: float | None = None
    veto: bool | None = None


@dataclass(frozen=True)
class Label:
    """What a labeler says of a pair.

    Args:
        id: The pair's id.
        p: Probability that response_1 is preferred, in [0, 1], after debiasing.
        p_12: The same, from the order (response_1, response_2) alone.
        p_21: The same, from the order (response_2, response_1) alone, mapped back to response_1.
        mass_12, mass_21: Probability that the judge gave to all candidate answers together, in [0, 1].
        rationale_12, rationale_21: What the judge wrote before it answered, if it was asked to; a list where
            it wrote several.
        judge: The judge's name.
        skipped: Why the pair could not be judged; the numbers are then None.
        score_1, score_2: Each response's own reward in [-1, 1], of a labeler that rates responses one by one.
        spread_1, spread_2: Standard deviation of the reward under the judge's distribution, its uncertainty.
        ratings_1, ratings_2: The distribution itself, of a labeler that asks for each response's rating: the
            probabilities of its ``candidates``, which add up to 1. Another judge can be taught them.
        bound_12, bound_21: How far p_12 and p_21 (or a rating on a scale of 0 to 1) may be off, since a server did not
            list every candidate; None where it did.
        voted: True where an answer was estimated from samples, and not read.
        criteria: What the judge says by each criterion or check of its own, where it was asked about several.
    """

    id: str
    p: float | None = None
    p_12: float | None = None
    p_21: float | None = None
    mass_12: float | None = None
    mass_21: float | None = None
    rationale_12: str | list[str] | None = None
    rationale_21: str | list[str] | None = None
    judge: str = ""
    skipped: str | None = None
    score_1: float | None = None
    score_2: float | None = None
    spread_1: float | None = None
    spread_2: float | None = None
    ratings_1: Sequence[float] | None = None
    ratings_2: Sequence[float] | None = None
    bound_12: float | None = None
    bound_21: float | None = None
    voted: bool | None = None
    criteria: Sequence[CriterionLabel] | None = None


@dataclass(frozen=True)
class SampledPair:
    """Two responses that a pair sampler made to a prompt, or why it made none.

    Args:
        id: The prompt's id.
        response_1, response_2: Two different texts, neither of them blank; None where there is no pair.
        extra: Further columns of the pair, such as how it was made; values are what JSON can hold.
        revision: A response to fine-tune on: it is also written to ``revisions.jsonl``, after the prompt.
        dropped: Why there is no pair; pairs that were dropped are counted by it.
    """

    id: str
    response_1: str | None = None
    response_2: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    dropped: str | None = None
