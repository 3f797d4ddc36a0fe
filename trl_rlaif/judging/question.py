"""What a judge is asked, and what it answers: the records between labelers and judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A judge's prompt, up to where it answers.

    Args:
        messages: Turns of user and assistant, the last one the user's. The earlier ones hold the exemplars.
        ending: What opens the answer and is completed with a candidate.
        thinking: What opens the answer where the judge writes a rationale first.
    """

    messages: tuple[Message, ...]
    ending: str
    thinking: str = ""


@dataclass(frozen=True)
class Thinking:
    """A rationale before the answer (chain of thought; methods.md, section 1).

    Args:
        rationales: Written for each question; their distributions are averaged (self-consistency).
        max_tokens: Longest rationale.
        temperature: 0 writes the likeliest one.
        seed: Of what is drawn.
    """

    rationales: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A judge's distribution over the candidates.

    Args:
        logprobs: Log-probabilities of the candidates in nats, one tuple for each rationale (a single one
            without). They are exact, or estimated from votes; -inf for what was never voted for.
        rationales: What the judge wrote before, in the same order.
        failed: Why there is no answer; ``logprobs`` is then empty.
    """

    logprobs: tuple[tuple[float, ...], ...] = ()
    rationales: tuple[str, ...] = ()
    failed: str | None = None
