"""Sampling responses, with the log-probability of every token taken while it is drawn."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trl_rlaif.ppo.cache import block_cache
from trl_rlaif.sampling import bare_generation_config


class LogprobRecorder(LogitsProcessor):
    """Applies the sampling temperature and keeps the log-probability of each token that is then drawn.

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
    stop_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one response a prompt from the whole distribution at a temperature.

    Args:
        model: Causal language model in the right role.
        prompt_ids: (B, P) int64, padded on the left.
        prompt_mask: (B, P) bool or int64.
        max_new_tokens: Longest response.
        temperature: > 0.
        pad_id: What fills a row after its end.
        stop_id: The end token, or None to sample to the full length.

    Returns:
        (response_ids, logprobs): (B, T) int64 and float32; T is at most ``max_new_tokens``.
    """
    recorder = LogprobRecorder(temperature)
    cache = block_cache(model)
    with bare_generation_config(model):
        sequences = model.generate(
            input_ids=prompt_ids.masked_fill(~prompt_mask.bool(), 0),
            attention_mask=prompt_mask.long(),
            logits_processor=LogitsProcessorList([recorder]),
            **({} if cache is None else {"past_key_values": cache}),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=pad_id,
                eos_token_id=stop_id,
            ),
        )
    return sequences[:, prompt_ids.shape[1] :], recorder.finish(sequences)


def response_lengths(
    response_ids: torch.Tensor, *, stop_id: int | None, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each response ends.

    Args:
        response_ids: (B, T) int64.
        stop_id: The end token; it belongs to the response.
        pad_id: Where it is not the end token it also ends a response, and does not belong to it.

    Returns:
        (lengths, ended): (B,) int64 in 0..T, and (B,) bool, True where the end token was sampled.
    """
    width = response_ids.shape[1]
    positions = torch.arange(width, device=response_ids.device).expand_as(response_ids)
    lengths = torch.full_like(positions[:, 0], width)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    if pad_id != stop_id:
        lengths = positions.masked_fill(response_ids != pad_id, width).amin(1)
    if stop_id is not None:
        stop = positions.masked_fill(response_ids != stop_id, width).amin(1)
        ended = stop < lengths
        lengths = torch.where(ended, stop + 1, lengths)
    return lengths, ended


def model_inputs(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, response_ids: torch.Tensor, lengths: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Prompts and responses as one batch: padded on the left before, on the right behind.

    Columns that are padding in every row are left out on the left.

    Returns:
        input_ids, attention_mask and position_ids, (B, at most P + T) int64 each; the last T columns
        are the responses.
    """
    first = int(prompt_mask.int().argmax(1).min())
    prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]
    width = response_ids.shape[1]
    response_mask = torch.arange(width, device=lengths.device) < lengths[:, None]
    mask = torch.cat((prompt_mask.bool(), response_mask), 1)
    return {
        "input_ids": torch.cat((prompt_ids, response_ids), 1).masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        # Counted without the padding on the left.
        "position_ids": mask.long().cumsum(1) - mask.long(),
    }
