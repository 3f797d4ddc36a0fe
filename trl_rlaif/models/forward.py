"""Forward passes of the roles over rows of responses: log-probabilities, values and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from trl_rlaif.batching import equal_lengths, pad_rows
from trl_rlaif.models.kernels import is_plain, token_logprobs_of
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.models.shared_model import backbone, inner_model
from trl_rlaif.types import RehearsalPair, Responses


@dataclass(frozen=True)
class RolloutSlice:
    """Some rows of responses, trimmed to their own width.

    Args:
        rows: (b,) int64 on the CPU, their indices.
        width: Response tokens of the longest of them, at least 1.
        value_width: Steps up to the last with a value: one more, if the responses are wider.
    """

    responses: Responses
    rows: torch.Tensor
    width: int
    value_width: int

    @classmethod
    def of(cls, responses: Responses, rows: torch.Tensor) -> RolloutSlice:
        width = max([1, *(responses.response_lengths[row] for row in rows.tolist())])
        return cls(responses, rows, width, min(width + 1, responses.response_ids.shape[1]))

    @property
    def tokens(self) -> torch.Tensor:
        """(b, width) int64."""
        return self.responses.response_ids[self.rows, : self.width]

    @property
    def mask(self) -> torch.Tensor:
        """(b, width) bool, True on response tokens."""
        return self.responses.masks()[0][self.rows, : self.width]

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each response token, (n,) int64 each: the mask as indices, without a device sync."""
        lengths = torch.tensor([self.responses.response_lengths[row] for row in self.rows.tolist()])
        rows, columns = (torch.arange(self.width) < lengths[:, None]).nonzero(as_tuple=True)
        device = self.responses.lengths.device
        return rows.to(device), columns.to(device)

    @property
    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, width) and (b, value_width) bool: the tokens, and the steps with a value, of responses with a reward."""
        tokens, steps = self.responses.learned()
        return tokens[self.rows, : self.width], steps[self.rows, : self.value_width]

    def inputs(self, *, last: bool) -> dict[str, torch.Tensor]:
        """Model inputs; without the ``last`` token if the output after it is not needed."""
        prompt_ids, prompt_mask, response_ids, lengths = self.responses.sequences(self.rows)
        width = self.width if last else self.width - 1
        first = prompt_ids.shape[1] - max(self.responses.prompt_lengths[row] for row in self.rows.tolist())
        return model_inputs(prompt_ids, prompt_mask, response_ids[:, :width], lengths.clamp(max=width), first)


def equal_prompts(mask: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """Group rows by prompt length, so that none needs left padding; shortest first.

    Args:
        mask: (B, P) bool, True on prompt tokens.
        rows: (N,) int64 on the CPU, the rows to group.
    """
    return [rows[group] for group in equal_lengths(mask.sum(1).cpu()[rows].tolist())]


def logprobs(
    role_models: RoleModels, part: str, rollout_slice: RolloutSlice, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the response tokens under the policy or reference, and the entropies.

    Returns:
        (logprobs, entropy), (b, width) float32 each, nats, zero after the ends. The entropy has no gradient.
    """
    with role_models.role(part):
        model = role_models.model(part)
        inputs = rollout_slice.inputs(last=False)
        if is_plain(model):
            hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state[:, -rollout_slice.width :]
            return from_hidden(model, hidden, rollout_slice, temperature)
        logits = inner_model(model)(**inputs, use_cache=False, logits_to_keep=rollout_slice.width).logits
        return from_logits(logits, rollout_slice, temperature)


def from_logits(
    logits: torch.Tensor, rollout_slice: RolloutSlice, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from (b, width, V) logits of any model."""
    logits = logits[rollout_slice.places]
    tokens = rollout_slice.tokens[rollout_slice.places]
    found = token_logprobs(logits, tokens, temperature), entropy(logits.detach(), temperature)
    return _spread(found[0], rollout_slice), _spread(found[1], rollout_slice)


def from_hidden(
    model: torch.nn.Module, hidden: torch.Tensor, rollout_slice: RolloutSlice, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from (b, width, H) hidden states, of a model whose head ``is_plain``."""
    places, head = rollout_slice.places, inner_model(model).get_output_embeddings()
    found = token_logprobs_of(hidden[places], head, rollout_slice.tokens[places], temperature)
    return _spread(found[0], rollout_slice), _spread(found[1], rollout_slice)


def values(role_models: RoleModels, rollout_slice: RolloutSlice) -> torch.Tensor:
    """(b, value_width) float32 values of the states before each response token and after the last."""
    with role_models.role("value"):
        return read_values(role_models, role_models.value_hidden(rollout_slice.inputs(last=True)), rollout_slice)


def read_values(role_models: RoleModels, hidden: torch.Tensor, rollout_slice: RolloutSlice) -> torch.Tensor:
    """The same from (b, S, H) hidden states of whole sequences."""
    return role_models.value_head(hidden[:, -rollout_slice.width - 1 :])[:, : rollout_slice.value_width].float()


def scores(role_models: RoleModels, rollout_slice: RolloutSlice) -> torch.Tensor:
    """(b, 1) float32 scores of whole responses, read at their last tokens; (b, 2) if the head has an e(x)."""
    return role_models.scores(rollout_slice.inputs(last=True), -rollout_slice.width - 1).float()


def policy_and_value(
    role_models: RoleModels, rollout_slice: RolloutSlice, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies and values in one pass, for a value head on the policy's trunk."""
    with role_models.role("policy"):
        model, inputs, width = role_models.model("policy"), rollout_slice.inputs(last=True), rollout_slice.width
        if is_plain(model):
            hidden = role_models.value_hidden(inputs)
            found = from_hidden(model, hidden[:, -width - 1 : -1], rollout_slice, temperature)
        else:
            hidden, logits = _hidden_and_logits(model, inputs, width + 1)
            found = from_logits(logits[:, :-1], rollout_slice, temperature)
        return *found, read_values(role_models, hidden, rollout_slice)


def _hidden_and_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, S, H) hidden states and the last (b, keep, V) logits, as the model computes them."""
    kept: list[torch.Tensor] = []
    hook = backbone(model).register_forward_hook(lambda _, __, output: kept.append(output.last_hidden_state))
    try:
        logits = inner_model(model)(**inputs, use_cache=False, logits_to_keep=keep).logits
    finally:
        hook.remove()
    return kept[0], logits


def _spread(flat: torch.Tensor, rollout_slice: RolloutSlice) -> torch.Tensor:
    """(b, width) with the entries of ``flat`` at the response tokens, and zero elsewhere."""
    zeros = torch.zeros(len(rollout_slice.rows), rollout_slice.width, dtype=flat.dtype, device=flat.device)
    return zeros.index_put(rollout_slice.places, flat)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability of each token at a sampling temperature.

    Args:
        logits: (B, T, V).
        tokens: (B, T) int64.
        temperature: > 0.

    Returns:
        (B, T) float32, nats.
    """
    logits = logits.float() / temperature
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy of each position's distribution: (B, T, V) to (B, T) float32, nats."""
    logits = logits.float() / temperature
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def model_inputs(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    response_ids: torch.Tensor,
    lengths: torch.Tensor,
    first: int | None = None,
) -> dict[str, torch.Tensor]:
    """Prompts and responses as one batch: left padding before, right padding after.

    Leading columns that are padding in every row are dropped.

    Args:
        first: The column where the longest prompt begins; None: read from the mask, which syncs the device.

    Returns:
        input_ids, attention_mask and position_ids, (B, at most P + T) int64 each; the last T columns
        are the responses.
    """
    first = int(prompt_mask.int().argmax(1).min()) if first is None else first
    prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]
    width = response_ids.shape[1]
    response_mask = torch.arange(width, device=lengths.device) < lengths[:, None]
    mask = torch.cat((prompt_mask.bool(), response_mask), 1)
    return {
        "input_ids": torch.cat((prompt_ids, response_ids), 1).masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        # Counted without the left padding.
        "position_ids": mask.long().cumsum(1) - mask.long(),
    }


def as_responses(
    pairs: Sequence[RehearsalPair], device: torch.device, ended: Sequence[bool] | None = None
) -> Responses:
    """Pairs as a batch.

    Args:
        ended: Whether each response ended; None: all did.
    """
    prompt_ids, prompt_mask = (x.to(device) for x in pad_rows((pair.prompt_ids for pair in pairs), left=True))
    response_ids, mask = (x.to(device) for x in pad_rows(pair.response_ids for pair in pairs))
    return Responses(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        lengths=mask.sum(1),
        ended=torch.tensor([True] * len(pairs) if ended is None else list(ended), device=device),
        prompts=[pair.prompt for pair in pairs],
        completions=[pair.response for pair in pairs],
    )
