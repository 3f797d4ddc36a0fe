"""Forward passes of the loop over rows of a rollout: what is read there, and nothing beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_rlaif.compute.head import is_plain, token_logprobs_of
from trl_rlaif.events import Rollout
from trl_rlaif.ppo.actors import Actors
from trl_rlaif.ppo.losses import entropy, token_logprobs
from trl_rlaif.ppo.rollout import model_inputs
from trl_rlaif.roles import backbone, inner_model


@dataclass(frozen=True)
class Passage:
    """Some rows of a rollout, no wider than they need to be.

    Args:
        rows: (b,) int64, which.
        width: Response tokens of the longest of them, at least 1.
        value_width: Steps up to the last that has a value: one more, where the rollout is wider.
    """

    rollout: Rollout
    rows: torch.Tensor
    width: int
    value_width: int

    @classmethod
    def of(cls, rollout: Rollout, rows: torch.Tensor) -> Passage:
        width = max(1, int(rollout.lengths[rows.to(rollout.lengths.device)].max()))
        return cls(rollout, rows, width, min(width + 1, rollout.response_ids.shape[1]))

    @property
    def tokens(self) -> torch.Tensor:
        """(b, width) int64."""
        return self.rollout.response_ids[self.rows, : self.width]

    @property
    def mask(self) -> torch.Tensor:
        """(b, width) bool, True on response tokens."""
        return self.rollout.masks()[0][self.rows, : self.width]

    @property
    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, width) and (b, value_width) bool: the tokens, and the steps with a value, of responses with a reward."""
        tokens, steps = self.rollout.learned()
        return tokens[self.rows, : self.width], steps[self.rows, : self.value_width]

    def inputs(self, *, last: bool) -> dict[str, torch.Tensor]:
        """For a model; without the ``last`` token where nobody reads what comes behind it."""
        prompt_ids, prompt_mask, response_ids, lengths = self.rollout.sequences(self.rows)
        width = self.width if last else self.width - 1
        return model_inputs(prompt_ids, prompt_mask, response_ids[:, :width], lengths.clamp(max=width))


def equal_prompts(mask: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows in groups whose prompts have the same length, so that none is padded on the left; the shortest first.

    Args:
        mask: (B, P) bool, True where a prompt token stands.
        rows: (N,) int64, which, on the CPU.
    """
    lengths = mask.sum(1).cpu()[rows]
    return [rows[lengths == length] for length in lengths.unique()]


def logprobs(actors: Actors, part: str, passage: Passage, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the response tokens under policy or reference, and their entropies.

    Returns:
        (logprobs, entropy), (b, width) float32 each, nats, zero behind the ends. The entropy passes no gradient.
    """
    with actors.playing(part):
        model = actors.model(part)
        inputs = passage.inputs(last=False)
        if is_plain(model):
            hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state[:, -passage.width :]
            return from_hidden(model, hidden, passage, temperature)
        logits = inner_model(model)(**inputs, use_cache=False, logits_to_keep=passage.width).logits
        return from_logits(logits, passage, temperature)


def from_logits(logits: torch.Tensor, passage: Passage, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from (b, width, V) scores of any model."""
    mask, logits = passage.mask, logits[passage.mask]
    found = token_logprobs(logits, passage.tokens[mask], temperature), entropy(logits.detach(), temperature)
    return _spread(found[0], mask), _spread(found[1], mask)


def from_hidden(
    model: torch.nn.Module, hidden: torch.Tensor, passage: Passage, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from (b, width, H) hidden states, of a model whose head ``is_plain``."""
    mask, head = passage.mask, inner_model(model).get_output_embeddings()
    found = token_logprobs_of(hidden[mask], head, passage.tokens[mask], temperature)
    return _spread(found[0], mask), _spread(found[1], mask)


def values(actors: Actors, passage: Passage) -> torch.Tensor:
    """(b, value_width) float32 values of the states before each response token and behind the last."""
    with actors.playing("value"):
        return read_values(actors, actors.value_hidden(passage.inputs(last=True)), passage)


def read_values(actors: Actors, hidden: torch.Tensor, passage: Passage) -> torch.Tensor:
    """The same from (b, S, H) hidden states of whole sequences."""
    return actors.value_head(hidden[:, -passage.width - 1 :])[:, : passage.value_width].float()


def scores(actors: Actors, passage: Passage) -> torch.Tensor:
    """(b, 1) float32 scores of whole responses, read at their last tokens; (b, 2), where the head has an e(x)."""
    return actors.scores(passage.inputs(last=True), -passage.width - 1).float()


def together(actors: Actors, passage: Passage, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies and values of a policy whose own trunk carries the value head, from one pass."""
    with actors.playing("policy"):
        model, inputs, width = actors.model("policy"), passage.inputs(last=True), passage.width
        if is_plain(model):
            hidden = actors.value_hidden(inputs)
            found = from_hidden(model, hidden[:, -width - 1 : -1], passage, temperature)
        else:
            hidden, logits = _hidden_and_logits(model, inputs, width + 1)
            found = from_logits(logits[:, :-1], passage, temperature)
        return *found, read_values(actors, hidden, passage)


def _hidden_and_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, S, H) hidden states and the last (b, keep, V) scores, whatever the model makes of the former."""
    kept: list[torch.Tensor] = []
    hook = backbone(model).register_forward_hook(lambda _, __, output: kept.append(output.last_hidden_state))
    try:
        logits = inner_model(model)(**inputs, use_cache=False, logits_to_keep=keep).logits
    finally:
        hook.remove()
    return kept[0], logits


def _spread(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(b, T) with the entries of ``flat`` where the mask is True, and zero elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
