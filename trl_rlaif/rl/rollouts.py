"""Sampling responses, recording the log-probability of every token as it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import compress
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trl_rlaif.batching import pad_rows
from trl_rlaif.generation import bare_generation_config
from trl_rlaif.models.kernels import static_cache
from trl_rlaif.responses import ResponseReader
from trl_rlaif.types import Responses, Rollout


class LogprobRecorder(LogitsProcessor):
    """Applies the sampling temperature and records the log-probability of each token that is then drawn.

    Only the distribution of one step is alive at a time, where ``output_scores`` would keep all of them.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._logprobs: list[torch.Tensor] = []
        self._distribution: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._settle(input_ids)
        scores = scores / self.temperature
        self._distribution = scores.float().log_softmax(-1)
        return scores

    def _settle(self, input_ids: torch.Tensor) -> None:
        if self._distribution is not None:
            self._logprobs.append(self._distribution.gather(1, input_ids[:, -1:]))
            self._distribution = None

    def finish(self, sequences: torch.Tensor) -> torch.Tensor:
        """(B, T) float32 log-probabilities of the sampled tokens."""
        self._settle(sequences)
        return torch.cat(self._logprobs, 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    pad_id: int,
    stop_id: int | Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one response per prompt from the full distribution at a temperature.

    Args:
        model: Causal language model in the desired role.
        prompt_ids: (B, P) int64, padded on the left.
        prompt_mask: (B, P) bool or int64.
        max_new_tokens: Maximum response length.
        temperature: > 0.
        pad_id: Fills a row after its end.
        stop_id: The token or tokens that end a response; None samples to the full length.

    Returns:
        (response_ids, logprobs): (B, T) int64 and float32; T is at most ``max_new_tokens``.
    """
    recorder = LogprobRecorder(temperature)
    with bare_generation_config(model):
        sequences = model.generate(
            input_ids=prompt_ids.masked_fill(~prompt_mask.bool(), 0),
            attention_mask=prompt_mask.long(),
            logits_processor=LogitsProcessorList([recorder]),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=pad_id,
                eos_token_id=stop_id if isinstance(stop_id, int) else list(stop_id or ()) or None,
                **static_cache(model, prompt_ids.shape[1] + max_new_tokens),
            ),
            synced_gpus=False,  # each process samples as many as it has
        )
    return sequences[:, prompt_ids.shape[1] :], recorder.finish(sequences)


def response_lengths(
    response_ids: torch.Tensor, *, stop_ids: Sequence[int], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each response ends.

    Args:
        response_ids: (B, T) int64.
        stop_ids: The tokens that end a response; they are part of it.
        pad_id: Unless one of them, it also ends a response, and is not part of it.

    Returns:
        (lengths, ended): (B,) int64 in 0..T, and (B,) bool, True where a stop token was sampled.
    """
    width = response_ids.shape[1]
    positions = torch.arange(width, device=response_ids.device).expand_as(response_ids)
    lengths = torch.full_like(positions[:, 0], width)
    if pad_id not in stop_ids:
        lengths = positions.masked_fill(response_ids != pad_id, width).amin(1)
    stops = torch.isin(response_ids, response_ids.new_tensor(stop_ids))
    stop = positions.masked_fill(~stops, width).amin(1)
    ended = stop < lengths
    return torch.where(ended, stop + 1, lengths), ended


def unpadded(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, response_ids: torch.Tensor, lengths: torch.Tensor
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt and each response in a batch of ``Responses``."""
    rows = zip(*(x.tolist() for x in (prompt_ids, prompt_mask, response_ids, lengths)), strict=True)
    return [(list(compress(prompt, mask)), response[:n]) for prompt, mask, response, n in rows]


def scored_rows(responses: Responses, reader: ResponseReader) -> Responses:
    """Responses in the form on which a reward model was trained: the answer, and the end of a turn.

    Another stop token at a response's end is replaced by that of a turn, and a response cut at the length limit gets
    it appended: a score is read at the end of a turn, whether or not the policy reached it.
    """
    rows = [reader.row(response, prompt) for prompt, response in unpadded(*responses.sequences(slice(None)))]
    response_ids, mask = (x.to(responses.lengths.device) for x in pad_rows(rows))
    return replace(responses, response_ids=response_ids, lengths=mask.sum(1))


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts with the same columns and rewards, padded if their widths differ."""
    values = {f.name: [getattr(rollout, f.name) for rollout in rollouts] for f in fields(Rollout)}
    return Rollout(**{name: _join(parts, left=name.startswith("prompt_")) for name, parts in values.items()})


def _join(parts: list[Any], *, left: bool = False) -> Any:
    if isinstance(parts[0], torch.Tensor):
        if parts[0].dim() < 2:
            return torch.cat(parts)
        width = max(part.shape[1] for part in parts)
        return torch.cat(
            [pad(part, ((width - part.shape[1], 0) if left else (0, width - part.shape[1]))) for part in parts]
        )
    if isinstance(parts[0], dict):
        return {name: _join([part[name] for part in parts]) for name in parts[0]}
    if parts[0] is None or isinstance(parts[0], float):
        return parts[0]
    return [value for part in parts for value in part]
