"""A causal language model that answers a judge's prompt with probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trl_rlaif.encoding import PromptLike, encode_prompt
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.scoring import ContinuationScorer, token_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CANDIDATES = ("1", "2")


@dataclass
class Judge:
    """A model, its tokenizer and its prompt.

    Args:
        model: Causal language model; its dropout must be off.
        tokenizer: With a chat template, the prompt goes through it; without, it is plain text.
        prompt: What the judge is asked.
        name: How the labels call it.
        batch_tokens: Most tokens in a forward pass, padding counted.
        context: Called for a context around every forward pass, for a judge that is a role of a shared base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: JudgePrompt
    name: str
    batch_tokens: int = 8192
    context: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        self._drop, self._continuations = self._candidate_tokens()
        pad = self.tokenizer.pad_token_id
        self._score = ContinuationScorer(self.model, 0 if pad is None else pad)

    @property
    def max_length(self) -> int:
        """Tokens that the model can read, the answer counted."""
        return getattr(self.model.config, "max_position_embeddings", None) or 10**9

    def _encode(self, text: str, opening: str) -> list[int]:
        prompt: PromptLike = [{"role": "user", "content": text}] if self.tokenizer.chat_template else text + "\n\n"
        return encode_prompt(self.tokenizer, prompt, opening=opening)

    def _candidate_tokens(self) -> tuple[int, list[list[int]]]:
        """How many tokens to take off the ending, and what stands there instead for each candidate.

        Usually none come off. Where a tokenizer joins the ending's last characters with the candidate,
        the continuations begin where all encodings part.
        """
        bare = self._encode("", self.prompt.ending)
        full = [self._encode("", self.prompt.ending + c) for c in CANDIDATES]
        shared = 0
        while all(shared < len(f) - 1 and shared < len(bare) and f[shared] == bare[shared] for f in full):
            shared += 1
        return len(bare) - shared, [f[shared:] for f in full]

    def encode(self, prompt: PromptLike, response_1: str, response_2: str) -> list[int]:
        """Token ids of the whole question, up to where the candidates are read."""
        ids = self._encode(self.prompt.render(prompt, response_1, response_2), self.prompt.ending)
        return ids[: len(ids) - self._drop]

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether a question and its answer fit into the model's context."""
        return len(ids) + max(map(len, self._continuations)) <= self.max_length

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices in batches of like length within the token budget; follows from the lengths alone."""
        return token_batches(lengths, self.batch_tokens)

    def logprobs(self, questions: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-probabilities of "1" and "2" after each encoded question: (N, 2) float32, one forward."""
        with self.context():
            return self._score(questions, self._continuations)
