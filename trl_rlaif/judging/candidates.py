"""A judge's candidate answers as tokens: probabilities of strings, however they are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trl_rlaif.judging.scoring import add, subtract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Candidates:
    """Candidates after one ending.

    Args:
        dropped: Tokens to remove from the ending, usually none: if the tokenizer merges the ending's last characters
            with the candidate, the continuations start where the encodings diverge.
        continuations: Token lists whose log-probabilities are needed.
        whole: For each candidate, the continuations that spell it (their probabilities add up).
        longer: For each candidate, the continuations that spell it and continue to another candidate, such as
            "10" for "1" (their probability is not the candidate's).
    """

    dropped: int
    continuations: list[list[int]]
    whole: list[list[int]]
    longer: list[list[int]]

    @classmethod
    def behind(
        cls,
        texts: Sequence[str],
        ending: str,
        encode: Callable[[str], list[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Candidates:
        """The candidates after an ending.

        Args:
            texts: The candidates.
            ending: What they complete.
            encode: Token ids of a prompt that ends with the text given.
            tokenizer: Its vocabulary is searched for the rest of a longer candidate.
        """
        bare, full = encode(ending), [encode(ending + text) for text in texts]
        shared = 0
        while all(shared < len(f) - 1 and shared < len(bare) and f[shared] == bare[shared] for f in full):
            shared += 1
        continuations = [f[shared:] for f in full]
        whole: list[list[int]] = [[i] for i in range(len(texts))]
        longer: list[list[int]] = [[] for _ in texts]
        vocabulary = tokenizer.get_vocab()
        for i, short in enumerate(texts):
            for j, long in enumerate(texts):
                if long == short or not long.startswith(short):
                    continue
                joined = full[j][shared:]
                if joined[: len(continuations[i])] == continuations[i]:
                    longer[i].append(j)  # "10" is "1" and more tokens: P("1") must not include it
                elif (rest := long[len(short) :]) in vocabulary:
                    # "10" is a token of its own; "1" and then "0" spells the same.
                    continuations.append([*continuations[i], vocabulary[rest]])
                    whole[j].append(len(continuations) - 1)
                    longer[i].append(len(continuations) - 1)
        return cls(len(bare) - shared, continuations, whole, longer)

    def cut(self, ids: list[int]) -> list[int]:
        """Token ids of a prompt that ends with the ending, up to where the continuations begin."""
        return ids[: len(ids) - self.dropped]

    def combine(self, logprobs: Sequence[float]) -> tuple[float, ...]:
        """Log-probabilities of the candidates from those of the continuations, in nats."""
        result = []
        for whole, longer in zip(self.whole, self.longer, strict=True):
            total = logprobs[whole[0]]
            for other in whole[1:]:
                total = add(total, logprobs[other])
            for other in longer:
                total = subtract(total, logprobs[other])
            result.append(total)
        return tuple(result)

    def distribution(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Normalized log-probabilities of the candidates, with gradients.

        Args:
            logprobs: (N, continuations) float, of the continuations in nats.

        Returns:
            (N, candidates), whose exponentials add up to 1 in each row.
        """
        columns = []
        for whole, longer in zip(self.whole, self.longer, strict=True):
            total = logprobs[:, whole].logsumexp(1)
            for other in longer:
                total = total + (-(logprobs[:, other] - total).exp()).log1p()
            columns.append(total)
        return torch.stack(columns, 1).log_softmax(1)
