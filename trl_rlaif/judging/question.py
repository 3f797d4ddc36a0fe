"""Questions to a judge and its answers: the records between labelers and judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from trl_rlaif.components import Options

Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A judge's prompt, up to the point where the answer starts.

    Args:
        messages: User and assistant turns, ending with the user's; earlier turns contain the exemplars.
        ending: Start of the answer, which a candidate completes.
        thinking: Start of the answer if the judge writes a rationale first.
    """

    messages: tuple[Message, ...]
    ending: str
    thinking: str = ""


@dataclass(frozen=True)
class Thinking:
    """A rationale before the answer (chain of thought; Lee et al. 2023, section 2.1).

    Args:
        rationales: Number of rationales per question; their distributions are averaged (self-consistency).
        max_tokens: Maximum tokens of a rationale, or the budget of a model's own reasoning, which is closed there.
        temperature: Sampling temperature; 0: greedy decoding.
        seed: Sampling seed.
    """

    rationales: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


class ThinkingOptions(Options):
    """Options of every labeler whose judge may write a rationale before it answers."""

    thinking: bool = Field(
        False, description="Let the judge think first: with the model's own reasoning, or else a rationale."
    )
    rationales: int = Field(1, ge=1, description="Rationales per question; their distributions are averaged.")
    rationale_tokens: int = Field(128, ge=1, description="Maximum tokens of a rationale or of reasoning.")
    rationale_temperature: float | None = Field(
        None, ge=0, description="Sampling temperature of rationales; null: 0 for one, 0.7 for several."
    )
    seed: int = Field(0, ge=0, description="Sampling seed of rationales.")

    def asked(self) -> Thinking | None:
        """The rationales to request; None without thinking."""
        if not self.thinking:
            return None
        temperature = self.rationale_temperature
        if temperature is None:
            temperature = 0.0 if self.rationales == 1 else 0.7
        return Thinking(self.rationales, self.rationale_tokens, temperature, self.seed)


@dataclass(frozen=True)
class Written:
    """A judge's free-form text.

    Args:
        text: Without the model's own thoughts.
        ended: Whether it is complete, not cut off.
        failed: The reason if there is no text.
    """

    text: str = ""
    ended: bool = True
    failed: str | None = None


@dataclass(frozen=True)
class Answer:
    """A judge's distribution over the candidates.

    Args:
        logprobs: Log-probabilities of the candidates in nats, one tuple per rationale (a single one
            without). Exact, or estimated from votes; -inf for candidates without a vote.
        rationales: The rationales, in the same order.
        failed: The reason if there is no answer; ``logprobs`` is then empty.
        bound: Upper bound on the candidates' normalized mass that may be misassigned, in [0, 1]: an unlisted token is
            only known to be no more likely than the least likely listed one.
        voted: Whether the numbers are proportions of sampled answers.
    """

    logprobs: tuple[tuple[float, ...], ...] = ()
    rationales: tuple[str, ...] = ()
    failed: str | None = None
    bound: float = 0.0
    voted: bool = False

    @property
    def rationale(self) -> str | list[str] | None:
        """As stored in a label: one text, a list of several, or None."""
        return list(self.rationales) if len(self.rationales) > 1 else next(iter(self.rationales), None)
