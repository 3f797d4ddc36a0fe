"""What every judge offers to labelers, wherever its model runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence

from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Question, Thinking

Group = Sequence[Question]


class Judge(ABC):
    """A language model that answers questions with probabilities.

    Args:
        prompt: Makes the questions.
        name: How the labels call the judge.
    """

    def __init__(self, prompt: JudgePrompt, name: str) -> None:
        self.prompt, self.name = prompt, name

    @abstractmethod
    def ask(
        self,
        groups: Sequence[Group],
        candidates: Sequence[str],
        *,
        thinking: Thinking | None = None,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Answers to groups of questions, in any order, as soon as they are known.

        Args:
            groups: Questions that belong together, such as a pair's two orders: they are answered together,
                and what they begin with is computed once. All have the same ending.
            candidates: The texts to choose from, such as "1" and "2".
            thinking: Rationales to write first, if any.
            done: Indices of groups whose answers are known already. The others are computed exactly as they
                would be without it.

        Yields:
            The group's index, and an Answer for each of its questions. A question that cannot be answered
            gives an Answer that says why.
        """
