"""A judge whose model runs in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from trl_rlaif.distributed import divided
from trl_rlaif.encoding import template_kwargs
from trl_rlaif.generation import sample_responses, seeded
from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.judge import Group, Judge
from trl_rlaif.judging.precision import Precision, Probe, choose_precision, matmul_precision
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Question, Thinking, Written
from trl_rlaif.judging.rationales import Rationale, Thoughts, Writing
from trl_rlaif.judging.scoring import ContinuationScorer
from trl_rlaif.responses import ResponseReader
from trl_rlaif.stopping import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOO_LONG = "longer than the judge's context"


class LocalJudge(Judge):
    """A causal language model of transformers.

    Args:
        model: In eval mode. Any dtype, NF4 too.
        tokenizer: With a chat template, questions go through it; without, they are plain text.
        prompt, name: As of every judge.
        batch_tokens: Most tokens that are computed at once.
        context: Called for a context around every forward pass, for a judge that is a role of a shared base.
        precision: Of float32 matrix products. "auto" takes the lowest that leaves the first questions' answers
            within 1e-4; what it found is then in ``probe``.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``, over those that
            ``set_template_kwargs`` gave the tokenizer.

    A judge that thinks uses the model's own thoughts, where its chat template has a place for them and
    ``enable_thinking`` is not False; else it writes a rationale that the prompt asks for.
    """

    PROBED = 4

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: JudgePrompt,
        name: str,
        *,
        batch_tokens: int = 8192,
        context: Callable[[], AbstractContextManager] = nullcontext,
        precision: Literal["auto"] | Precision = "highest",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(prompt, name)
        self.model, self.tokenizer = model, tokenizer
        self.template_kwargs = template_kwargs(tokenizer, chat_template_kwargs)
        self.batch_tokens, self.context, self.precision = batch_tokens, context, precision
        self.probe: Probe | None = None

    @property
    def max_length(self) -> int:
        """Tokens that the model can read, the answer counted."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9

    def encode(self, question: Question, opening: str) -> list[int]:
        """Token ids of a question and of what its answer begins with."""
        return self._writing(None).encode(question.messages, opening)

    def candidates(self, texts: Sequence[str], ending: str, thinking: Thinking | None = None) -> Candidates:
        """The candidates as the tokenizer spells them behind an ending."""
        return Candidates.behind(texts, ending, self._writing(thinking).opened, self.tokenizer)

    def _writing(self, thinking: Thinking | None) -> Any:
        """How questions are put, with what is written before the answer."""
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
        """As of every judge. Batches follow from all groups, also those in ``done``."""
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
        flat = [context for group in contexts for context in group]
        # Nobody knows how many tokens a rationale is read as: decoded, it may be split otherwise.
        longest = self.max_length if thinking else max(map(len, flat))
        with self.context():
            scorer = ContinuationScorer(self.model, known.continuations, longest=longest, pad_id=self.pad_id)
        self._choose_precision(scorer, contexts)
        with self._computing():
            scorer.begin(flat)

        def answers(batch: list[int]) -> list[list[Answer]]:
            # The whole batch, also where a part is known: what is computed together may change the last digits.
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
        """As of every judge, in one batch."""
        contexts = [self.encode(question, "") for question in questions]
        fitting = [context for context in contexts if len(context) + max_tokens <= self.max_length]
        reader = ResponseReader(self.tokenizer, stop_ids(self.tokenizer, self.model))
        drawn = []
        if fitting:
            with self._computing(), seeded(seed, "writing", *fitting):
                drawn = sample_responses(
                    self.model,
                    self.tokenizer,
                    fitting,
                    max_new_tokens=max_tokens,
                    temperature=temperature,
                    stop_ids=reader.stop_ids,
                    keep_end=True,
                )
        read = iter([reader.read(ids, context) for (ids,), context in zip(drawn, fitting, strict=True)])
        found = [next(read) if context in fitting else None for context in contexts]
        return [Written(failed=TOO_LONG) if one is None else Written(one.answer.strip(), one.ended) for one in found]

    def _choose_precision(self, scorer: ContinuationScorer, contexts: Sequence[Sequence[list[int]]]) -> None:
        if self.precision != "auto" or self.probe is not None or self.model.dtype != torch.float32:
            return  # weights in less than float32 leave no choice
        few = contexts[:: max(1, len(contexts) // self.PROBED)][: self.PROBED]

        def probabilities() -> list[float]:
            with self.context():
                return scorer(few).softmax(-1).flatten().tolist()

        self.probe = choose_precision(probabilities)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        chosen = self.probe.precision if self.probe else "highest" if self.precision == "auto" else self.precision
        with self.context(), matmul_precision(chosen):
            yield

    @property
    def pad_id(self) -> int:
        """Of a token that pads; it is masked."""
        return self.tokenizer.pad_token_id or 0

    def _answers(
        self, scorer: ContinuationScorer, known: Candidates, contexts: Sequence[Sequence[list[int]]]
    ) -> list[list[Answer]]:
        if not contexts:
            return []
        with self._computing():
            rows = iter(scorer(contexts).tolist())
        return [[_answer(known, next(rows)) for _ in group] for group in contexts]

    def _behind(
        self,
        scorer: ContinuationScorer,
        known: Candidates,
        asked: Sequence[Group],
        contexts: Sequence[Sequence[list[int]]],
        thinking: Thinking,
    ) -> list[list[Answer]]:
        """Step one writes the rationales, step two reads the distribution behind each of them."""
        limit, writing = self.max_length - max(map(len, known.continuations)), self._writing(thinking)
        flat = [context for group in contexts for context in group]
        rationales = iter(self._rationales(writing, flat, asked[0][0].ending, thinking))
        written = [[next(rationales) for _ in group] for group in asked]
        # A question with each of its rationales is a group: they begin with the question itself.
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
        drawn_count = count if thinking.temperature > 0 else 1  # the likeliest one is the same each time
        with self._computing(), seeded(thinking.seed, "rationale", *contexts):
            drawn = sample_responses(
                self.model,
                self.tokenizer,
                contexts,
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
    """One answer of those behind each rationale."""
    failed = next((answer.failed for answer in answers if answer.failed), None)
    if failed:
        return Answer(rationales=tuple(rationales), failed=failed)
    return Answer(tuple(answer.logprobs[0] for answer in answers), tuple(rationales))
