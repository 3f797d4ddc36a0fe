"""Prompts, pairs of responses, and their labels."""

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
    """A prompt.

    Args:
        id: Unique within its source.
        prompt: Text, or a conversation that ends with the turn to answer (user or tool) or with an assistant turn,
            which the response continues. Never blank.
        category: Category of the prompt, if the data has one.
        extra: The other columns of the row, unchanged.
    """

    id: str
    prompt: str | list[Message]
    category: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A prompt with two different, non-blank responses.

    Args:
        id: Unique within its source.
        prompt: Text, or a conversation that ends with the turn to answer (user or tool) or with an assistant turn,
            which the response continues. Never blank.
        response_1: The first response.
        response_2: The second response. The order does not imply a preference.
        category: Category of the prompt, if the data has one.
        human: The response that a person preferred: 1 or 2; 0 for a tie; None if unknown.
        extra: The other columns of the row, unchanged.
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
        """Both responses, in order."""
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
    """The rows of one source: the usable items, in order, and the rows left out."""

    items: list[T]
    skipped: list[Skip]

    def skip_counts(self) -> dict[str, int]:
        """The number of rows left out for each reason, the most frequent reason first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())


@dataclass(frozen=True)
class CriterionLabel:
    """A labeler's verdict on a pair by a single criterion.

    Args:
        criterion: Name or text of the criterion.
        weight: Weight in the label; meeting a criterion of negative weight makes a response worse.
        p, p_12, p_21: As in Label, by this criterion alone; for criteria that compare the responses.
        score_1, score_2: For criteria that are asked about each response: the probability in [0, 1] that it is met, or
            the rating as a reward in [-1, 1].
        veto: True for a criterion that must be met; its weight is 0.
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
    """A labeler's verdict on a pair.

    Args:
        id: Id of the pair.
        p: Probability in [0, 1] that response_1 is preferred, after debiasing.
        p_12: The same, from the order (response_1, response_2) alone.
        p_21: The same, from the order (response_2, response_1) alone; still the probability of response_1.
        mass_12, mass_21: Total probability of all candidate answers under the judge, in [0, 1].
        rationale_12, rationale_21: What the judge wrote before its answer, if it was asked to; a list if it wrote
            several rationales.
        judge: Name of the judge.
        skipped: Why the pair could not be judged; the numbers are then None.
        score_1, score_2: Reward of each response in [-1, 1], for labelers that rate responses separately.
        spread_1, spread_2: Standard deviation of the reward under the judge's distribution, a measure of uncertainty.
        ratings_1, ratings_2: The distribution over ratings of each response: probabilities of the labeler's
            ``candidates``, which sum to 1. Another judge can be taught them.
        bound_12, bound_21: Maximum error of p_12 and p_21 (or of a rating on a scale of 0 to 1) if a server did not
            list every candidate; None if it did.
        voted: True if an answer was estimated from samples instead of log-probabilities.
        criteria: The verdict by each criterion or check, if the judge was asked about several.
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
    """A pair sampler's two responses to a prompt, or the reason why there are none.

    Args:
        id: Id of the prompt.
        response_1, response_2: Two different, non-blank texts; None if there is no pair.
        extra: Additional columns of the pair, such as how it was made; values must be JSON-serializable.
        revision: A response to fine-tune on, also written to ``revisions.jsonl`` with its prompt.
        dropped: Why there is no pair; dropped prompts are counted by reason.
    """

    id: str
    response_1: str | None = None
    response_2: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    dropped: str | None = None
