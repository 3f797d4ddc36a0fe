"""Rehearsal during PPO (Peng et al. 2023): the pairs, their batches, the weight of their NLL."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.encoding import encode_prompt, encode_response
from trl_rlaif.errors import UserError
from trl_rlaif.models.forward import as_responses
from trl_rlaif.types import RehearsalPair, Responses

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from trl_rlaif.rl.ppo.config import PPOConfig

logger = logging.getLogger(__name__)


class Rehearsal:
    """The pairs D_R, in shuffled passes, and the step in which they are rehearsed.

    Args:
        given: The user's own pairs, which are always kept.
        args: The rehearsal weight, its schedule and the batch size.
        seed: Of the shuffling: different in each process.
    """

    def __init__(self, given: Sequence[RehearsalPair], args: PPOConfig, seed: int = 0) -> None:
        self.given, self.pairs, self.args = list(given), list(given), args
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        self._seconds = 0.0

    def step(
        self, backward: Callable[[Responses, float], torch.Tensor], progress: float, device: torch.device
    ) -> torch.Tensor:
        """Add the gradients of the next pairs to an optimizer step; their NLL, nats per token.

        Args:
            backward: Adds the gradients of a batch's NLL times a weight, and returns the NLL (``PPOStep.rehearse``).
            progress: Fraction of all updates completed, 0..1.
            device: Of the models.
        """
        began = _clock(device)
        pairs = as_responses(self.draw(batch_size(self.args)), device)
        nll = backward(pairs, weight(self.args, progress))
        self._seconds += _clock(device) - began
        return nll

    def metrics(self, progress: float) -> dict[str, float]:
        """Weight and number of the pairs, and the steps' duration since the last call; {} without pairs."""
        if not self.pairs:
            return {}
        coef = weight(self.args, progress)
        return {"rehearsal/coef": coef, "rehearsal/pairs": len(self.pairs), "time/rehearsal": self.take_seconds()}

    def take_seconds(self) -> float:
        """The steps' duration since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def fill(self, selected: Sequence[RehearsalPair]) -> None:
        """Replace the pairs selected before by these. Those without a response are left out."""
        self.pairs = [*self.given, *(pair for pair in selected if pair.response_ids)]
        self._order = []

    def draw(self, size: int) -> list[RehearsalPair]:
        """The next pairs; each one occurs once per pass."""
        drawn: list[int] = []
        while len(drawn) < size:
            if not self._order:
                self._order = torch.randperm(len(self.pairs), generator=self._generator).tolist()
            drawn.append(self._order.pop())
        return [self.pairs[i] for i in drawn]

    def state_dict(self) -> dict[str, Any]:
        """The position in the pass, for this process."""
        return {"rehearsal": {"generator": self._generator.get_state(), "order": list(self._order)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position in the pass."""
        self._generator.set_state(state["rehearsal"]["generator"])
        self._order = list(state["rehearsal"]["order"])


def _clock(device: torch.device) -> float:
    """Seconds, after synchronizing the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def batch_size(args: PPOConfig) -> int:
    """Pairs per optimizer step and process.

    By default a quarter of a minibatch, or an eighth if the value is a head on the policy's trunk: rehearsal has one
    forward and backward pass where PPO has two (or one), and PPO also samples and scores.
    """
    if args.rehearsal_batch_size is not None:
        return args.rehearsal_batch_size
    return max(1, args.local_mini_batch_size // (8 if args.value == "trunk" else 4))


def weight(args: PPOConfig, progress: float) -> float:
    """The rehearsal weight after a fraction of all updates, 0..1; it is constant, or decays to zero."""
    if args.rehearsal_schedule == "linear":
        return args.rehearsal_coef * (1 - progress)
    if args.rehearsal_schedule == "cosine":
        return args.rehearsal_coef * (1 + math.cos(math.pi * progress)) / 2
    return args.rehearsal_coef


def given_pairs(
    dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> list[RehearsalPair]:
    """A user's own pairs in TRL's prompt-completion format, as text or as messages.

    Args:
        dataset: With ``prompt`` and ``completion``; None for no pairs.
        tokenizer: With a chat template, if they are messages.
        max_length: Maximum tokens of prompt and completion; longer pairs are left out, and counted.

    Raises:
        UserError: A column is missing, a completion is empty or not one assistant message, or every pair is too long.
    """
    if dataset is None:
        return []
    missing = {"prompt", "completion"} - set(dataset.column_names)
    if missing:
        raise UserError(
            f"The rehearsal dataset has no column '{min(missing)}'; it has {', '.join(dataset.column_names)}.",
            fix="Rename its columns to 'prompt' and 'completion'.",
        )
    pairs = [_given(row, number, tokenizer) for number, row in enumerate(dataset)]
    kept = [p for p in pairs if max_length is None or len(p.prompt_ids) + len(p.response_ids) <= max_length]
    if not kept:
        raise UserError(f"Every pair to rehearse is longer than {max_length} tokens." if pairs else "It is empty.")
    if len(kept) < len(pairs):
        left_out = len(pairs) - len(kept)
        logger.warning("%d of %d pairs to rehearse are longer than %d tokens.", left_out, len(pairs), max_length)
    return kept


def _given(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> RehearsalPair:
    completion = row["completion"]
    messages = completion if isinstance(completion, list) else [{"content": completion}]
    text = messages[0].get("content") if len(messages) == 1 else None
    if not text or not row["prompt"]:
        raise UserError(
            f"Row {number} of the rehearsal dataset (counted from 0) has no prompt, or no completion of one message.",
            fix="Give a text, or a list with one assistant message.",
        )
    prompt_ids, response_ids = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, text)
    return RehearsalPair(row["prompt"], completion, None, None, "given", prompt_ids, response_ids)


def lines(pairs: Sequence[RehearsalPair]) -> list[dict[str, Any]]:
    """Pairs as the lines of rehearsal.jsonl."""
    names = [f.name for f in dataclasses.fields(RehearsalPair) if not f.name.endswith("_ids")]
    return [{name: getattr(pair, name) for name in names} for pair in pairs]
