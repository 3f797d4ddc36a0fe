"""What every judge offers to labelers, wherever its model runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Question, Thinking, Written

if TYPE_CHECKING:
    from trl_rlaif.types import Pair

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

    def write(
        self, questions: Sequence[Question], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Written]:
        """Texts in answer to requests without candidates, such as ``JudgePrompt.draft``'s.

        Args:
            questions: Without endings.
            max_tokens: Longest text.
            temperature: 0 writes the likeliest one.
            seed: Of what is drawn, which may also depend on all questions of the call.

        Returns:
            One for each question.
        """
        raise NotImplementedError(f"{type(self).__name__} answers with probabilities alone.")


Candidates = tuple[str, ...]


def done_indices(pairs: Sequence[Pair], done: Collection[str]) -> set[int]:
    """The places of the pairs whose ids are done, as ``Judge.ask`` takes them."""
    ids = set(done)
    return {index for index, pair in enumerate(pairs) if pair.id in ids}


def ask_together(
    judge: Judge,
    items: Sequence[Mapping[Candidates, Sequence[Group]]],
    *,
    thinking: Thinking | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, dict[Candidates, list[list[Answer]]]]]:
    """Answers to items of several groups, whichever candidates these have, as soon as all of an item's are known.

    Questions are computed together where they are a group: those of a pair's two responses, say, are two groups, since
    the criteria that a response is judged by share more than the responses do.

    Args:
        judge: Is asked once for each kind of candidates.
        items: For each item, its groups by their candidates: as many in every item.
        thinking: Rationales to write first, if any.
        done: Indices of items whose answers are known already, as of ``Judge.ask``.

    Yields:
        The item's index, and by candidates the answers to each of its groups.
    """
    counts = {candidates: len(groups) for candidates, groups in items[0].items()} if items else {}
    asked = {}
    for candidates, count in counts.items():
        known = {count * i + j for i in done for j in range(count)}
        flat = [group for item in items for group in item[candidates]]
        asked[candidates] = judge.ask(flat, candidates, thinking=thinking, done=known)
    found: dict[int, dict[tuple[Candidates, int], list[Answer]]] = {}
    while asked:
        # In turn, so that no item waits until all questions of another kind are answered.
        for candidates in list(asked):
            index, answers = next(asked[candidates], (None, []))
            if index is None:
                del asked[candidates]
                continue
            item, place = divmod(index, counts[candidates])
            parts = found.setdefault(item, {})
            parts[candidates, place] = answers
            if len(parts) == sum(counts.values()):
                yield item, {kind: [parts[kind, j] for j in range(n)] for kind, n in counts.items()}
                del found[item]
