"""The base of judges whose model takes tokens, wherever it runs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from trl_rlaif.distributed import divided
from trl_rlaif.encoding import template_kwargs
from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.judge import Group, Judge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Question, Thinking, Written
from trl_rlaif.judging.rationales import Rationale, Thoughts, Writing
from trl_rlaif.responses import ResponseReader
from trl_rlaif.stopping import stop_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from trl_rlaif.batching import Tokens

TOO_LONG = "longer than the judge's context"


class Scorer(Protocol):
    """Log-probabilities of the same continuations after contexts, which come in groups that share a prefix."""

    def batches(self, groups: Sequence[Sequence[Tokens]], budget: int) -> list[list[int]]:
        """Indices of groups in batches, each within a token budget."""

    def __call__(self, groups: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """(contexts, continuations), nats, group by group."""


class TokenJudge(Judge):
    """A causal language model that answers from the log-probabilities of the candidates' tokens.

    To think first, it uses the model's own reasoning if its chat template supports it and ``enable_thinking`` is not
    False; otherwise it writes a rationale that the prompt asks for.

    Args:
        model: Its ``generation_config`` may name stop tokens.
        tokenizer: With a chat template, questions go through it; without, they are plain text.
        prompt, name: As in Judge.
        batch_tokens: Maximum tokens per batch.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``; they override those set by
            ``set_template_kwargs``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt: JudgePrompt,
        name: str,
        *,
        batch_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(prompt, name)
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.template_kwargs = template_kwargs(tokenizer, chat_template_kwargs)

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Context length of the model in tokens, including the answer."""

    @abstractmethod
    def _scorer(self, known: Candidates, contexts: Sequence[Sequence[list[int]]], longest: int) -> Scorer:
        """A scorer of the candidates after these contexts, and others of at most ``longest`` tokens."""

    @abstractmethod
    def _sample(
        self,
        contexts: Sequence[list[int]],
        *,
        seed: tuple[object, ...],
        num_responses: int = 1,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        keep_end: bool = False,
    ) -> list[list[list[int]]]:
        """As ``sample_responses``; samples are determined by ``seed`` and contexts."""

    def _computing(self) -> AbstractContextManager[None]:
        """Context for all computation."""
        return nullcontext()

    def encode(self, question: Question, opening: str) -> list[int]:
        """Token ids of a question and the start of its answer."""
        return self._writing(None).encode(question.messages, opening)

    def candidates(self, texts: Sequence[str], ending: str, thinking: Thinking | None = None) -> Candidates:
        """The candidates as tokenized after an ending."""
        return Candidates.behind(texts, ending, self._writing(thinking).opened, self.tokenizer)

    def _writing(self, thinking: Thinking | None) -> Any:
        """The encoding of questions, with any text written before the answer."""
        how = self.tokenizer, self.prompt, self.template_kwargs
        return Writing(*how) if thinking is None else Thoughts.of(*how) or Rationale(*how)

    def ask(
        self,
        groups: Sequence[Group],
        candidates: Sequence[str],
        *,
        thinking: Thinking | None = None,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As in Judge. Batches are formed from all groups, including those in ``done``."""
        if not groups:
            return
        writing, ending = self._writing(thinking), groups[0][0].ending
        known = self.candidates(candidates, ending, thinking)
        room = max(map(len, known.continuations))
        if thinking:
            room += thinking.max_tokens + writing.room(ending)
        fitting, contexts = [], []
        for index, group in enumerate(groups):
            encoded = [writing.begin(q) if thinking else known.cut(writing.begin(q)) for q in group]
            if max(map(len, encoded)) + room <= self.max_length:
                fitting.append(index)
                contexts.append(encoded)
            elif index not in done:
                yield index, [Answer(failed=TOO_LONG)] * len(group)
        if not contexts:
            return
        # A rationale's limit does not bound its length when read: decoded, it may be tokenized differently.
        longest = self.max_length if thinking else max(len(context) for group in contexts for context in group)
        scorer = self._scorer(known, contexts, longest)

        def answers(batch: list[int]) -> list[list[Answer]]:
            # The whole batch, even if part of it is known: the batch's composition may change the last digits.
            asked = [contexts[i] for i in batch]
            if thinking is None:
                return self._answers(scorer, known, asked)
            return self._behind(scorer, known, [groups[fitting[i]] for i in batch], asked, thinking)

        batches = scorer.batches(contexts, self.batch_tokens)
        todo = [batch for batch in batches if any(fitting[i] not in done for i in batch)]
        for batch, found in divided(todo, answers):
            for i, of_group in zip(batch, found, strict=True):
                if fitting[i] not in done:
                    yield fitting[i], of_group

    def write(
        self, questions: Sequence[Question], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Written]:
        """As in Judge, in one batch."""
        contexts = [self.encode(question, "") for question in questions]
        fitting = [context for context in contexts if len(context) + max_tokens <= self.max_length]
        reader = ResponseReader(self.tokenizer, stop_ids(self.tokenizer, self.model))
        drawn = []
        if fitting:
            how = {"max_new_tokens": max_tokens, "temperature": temperature, "stop_ids": reader.stop_ids}
            drawn = self._sample(fitting, seed=(seed, "writing"), keep_end=True, **how)
        read = iter([reader.read(ids, context) for (ids,), context in zip(drawn, fitting, strict=True)])
        found = [next(read) if context in fitting else None for context in contexts]
        return [Written(failed=TOO_LONG) if one is None else Written(one.answer.strip(), one.ended) for one in found]

    def _answers(
        self, scorer: Scorer, known: Candidates, contexts: Sequence[Sequence[list[int]]]
    ) -> list[list[Answer]]:
        if not contexts:
            return []
        with self._computing():
            rows = iter(scorer(contexts).tolist())
        return [[_answer(known, next(rows)) for _ in group] for group in contexts]

    def _behind(
        self,
        scorer: Scorer,
        known: Candidates,
        asked: Sequence[Group],
        contexts: Sequence[Sequence[list[int]]],
        thinking: Thinking,
    ) -> list[list[Answer]]:
        """Step one writes the rationales, step two reads the distribution after each of them."""
        limit, writing = self.max_length - max(map(len, known.continuations)), self._writing(thinking)
        flat = [context for group in contexts for context in group]
        rationales = iter(self._rationales(writing, flat, asked[0][0].ending, thinking))
        written = [[next(rationales) for _ in group] for group in asked]
        # A question with each of its rationales is a group: they share the question as a prefix.
        behind = [
            [known.cut(writing.behind(question, rationale)) for rationale in of_question]
            for group, of_group in zip(asked, written, strict=True)
            for question, of_question in zip(group, of_group, strict=True)
        ]
        fits = [max(map(len, contexts)) <= limit for contexts in behind]
        readable = [contexts for contexts, fit in zip(behind, fits, strict=True) if fit]
        read = iter(self._answers(scorer, known, readable))
        answers = iter([next(read) if fit else [Answer(failed=TOO_LONG)] for fit in fits])
        return [[_joined(next(answers), of_question) for of_question in of_group] for of_group in written]

    def _rationales(
        self, writing: Rationale, contexts: Sequence[list[int]], ending: str, thinking: Thinking
    ) -> list[list[str]]:
        count = thinking.rationales
        drawn_count = count if thinking.temperature > 0 else 1  # greedy decoding always gives the same one
        drawn = self._sample(
            contexts,
            seed=(thinking.seed, "rationale"),
            num_responses=drawn_count,
            max_new_tokens=thinking.max_tokens,
            temperature=thinking.temperature,
            stop_ids=writing.stop_ids(self.model),
        )
        return [writing.texts(rows, ending) * (count // drawn_count) for rows in drawn]


def _answer(known: Candidates, logprobs: list[float]) -> Answer:
    if not all(map(math.isfinite, logprobs)):
        return Answer(failed="the judge's probabilities are not finite")
    return Answer((known.combine(logprobs),))


def _joined(answers: list[Answer], rationales: list[str]) -> Answer:
    """The answers after each rationale, joined into one."""
    failed = next((answer.failed for answer in answers if answer.failed), None)
    if failed:
        return Answer(rationales=tuple(rationales), failed=failed)
    return Answer(tuple(answer.logprobs[0] for answer in answers), tuple(rationales))
