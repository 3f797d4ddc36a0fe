"""The interface of judges for labelers, wherever the model runs."""

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
        prompt: The judge's prompt, which makes the questions.
        name: Name of the judge in labels.
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
        """Answer groups of questions, in any order, as soon as the answers are available.

        Args:
            groups: Questions that belong together, such as a pair's two orders. They are answered together, and their
                shared prefix is computed once. All have the same ending.
            candidates: The texts to choose from, such as "1" and "2".
            thinking: Rationales to write first, if any.
            done: Indices of groups whose answers are already known. It does not change how the others are
                computed.

        Yields:
            The index of the group and an Answer for each of its questions. If a question cannot be answered,
            its Answer gives the reason.
        """

    def write(
        self, questions: Sequence[Question], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Written]:
        """Write texts for requests without candidates, such as those of ``JudgePrompt.draft``.

        Args:
            questions: Without endings.
            max_tokens: Maximum tokens of a text.
            temperature: Sampling temperature; 0: greedy decoding.
            seed: Sampling seed; samples may also depend on all questions of the call.

        Returns:
            A text for each question.
        """
        raise NotImplementedError(f"{type(self).__name__} answers with probabilities alone.")


Candidates = tuple[str, ...]


def done_indices(pairs: Sequence[Pair], done: Collection[str]) -> set[int]:
    """Indices of the pairs whose ids are done, as ``Judge.ask`` takes them."""
    ids = set(done)
    return {index for index, pair in enumerate(pairs) if pair.id in ids}


def ask_together(
    judge: Judge,
    items: Sequence[Mapping[Candidates, Sequence[Group]]],
    *,
    thinking: Thinking | None = None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, dict[Candidates, list[list[Answer]]]]]:
    """Answer items with several groups of questions, whose candidates may differ; yields each item when complete.

    The questions of a group are computed together. A pair's two responses, for example, form two groups, since the
    questions about one response share a longer prefix than the two responses do.

    Args:
        judge: The judge, which is asked once for each set of candidates.
        items: For each item, its groups by candidates; the same number in every item.
        thinking: Rationales to write first, if any.
        done: Indices of items whose answers are already known, as in ``Judge.ask``.

    Yields:
        The index of the item and, by candidates, the answers to each of its groups.
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
