"""A judge whose model runs in this process, with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from trl_rlaif.generation import sample_responses, seeded
from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.precision import Precision, Probe, choose_precision, matmul_precision
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.scoring import ContinuationScorer
from trl_rlaif.judging.tokens import TokenJudge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalJudge(TokenJudge):
    """A causal language model from transformers.

    Batches are formed from all questions, including those already done.

    Args:
        model: In eval mode. Any dtype, NF4 too.
        tokenizer, prompt, name, chat_template_kwargs: As in TokenJudge.
        batch_tokens: Maximum tokens per batch.
        context: Returns a context for every forward pass, for a judge that is a role of a shared base.
        precision: Of float32 matrix products. "auto" picks the lowest that changes the probabilities of a few questions
            by at most 1e-4, and stores its findings in ``probe``.
    """

    PROBED = 4
    model: PreTrainedModel

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
        how = {"batch_tokens": batch_tokens, "chat_template_kwargs": chat_template_kwargs}
        super().__init__(model, tokenizer, prompt, name, **how)
        self.context, self.precision = context, precision
        self.probe: Probe | None = None

    @property
    def max_length(self) -> int:
        """Context length of the model in tokens, including the answer."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 10**9

    @property
    def pad_id(self) -> int:
        """Token id for padding, which is masked."""
        return self.tokenizer.pad_token_id or 0

    def _scorer(self, known: Candidates, contexts: Sequence[Sequence[list[int]]], longest: int) -> ContinuationScorer:
        with self.context():
            scorer = ContinuationScorer(self.model, known.continuations, longest=longest, pad_id=self.pad_id)
        self._choose_precision(scorer, contexts)
        with self._computing():
            scorer.begin([context for group in contexts for context in group])
        return scorer

    def _sample(
        self, contexts: Sequence[list[int]], *, seed: tuple[object, ...], **options: Any
    ) -> list[list[list[int]]]:
        with self._computing(), seeded(*seed, *contexts):
            return sample_responses(self.model, self.tokenizer, contexts, **options)

    def _choose_precision(self, scorer: ContinuationScorer, contexts: Sequence[Sequence[list[int]]]) -> None:
        if self.precision != "auto" or self.probe is not None or self.model.dtype != torch.float32:
            return  # lower-precision weights leave no choice
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
