"""The gradients of one micro-batch: policy and value, one after the other or off one trunk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from trl_rlaif.compute.cpu_attention import trainable_attention
from trl_rlaif.compute.precision import autocast
from trl_rlaif.events import Rollout
from trl_rlaif.ppo import losses, passes
from trl_rlaif.ppo.actors import Actors
from trl_rlaif.ppo.passes import Passage
from trl_rlaif.ppo.processes import backward, equal_count

Stats = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a rollout that are normalized together.

    Args:
        advantages, returns: (B, T) float32 of the whole rollout.
        rows: (b,) int64, which of them.
        weight: Of this micro-batch's losses in the step.
    """

    rollout: Rollout
    advantages: torch.Tensor
    returns: torch.Tensor
    rows: torch.Tensor
    weight: float = 1.0


def parts(rollout: Rollout, rows: torch.Tensor, tokens: int | None) -> Iterator[torch.Tensor]:
    """Rows in parts of at most so many tokens, padding counted, and of at least one row."""
    if tokens is None:
        yield rows
        return
    prompts, lengths = rollout.prompt_mask.sum(1).tolist(), rollout.lengths.tolist()
    part: list[int] = []
    for row in rows.tolist():
        grown = [*part, row]
        width = max(prompts[i] for i in grown) + max(1, *(lengths[i] for i in grown))
        if part and width * len(grown) > tokens:
            yield torch.tensor(part)
            grown = [row]
        part = grown
    yield torch.tensor(part)


@dataclass(frozen=True)
class Objective:
    """PPO's losses on the actors (Schulman et al. 2017, eq. 7 and 9), and their backward passes.

    Args:
        pads: Whether a forward pass may hold prompts of different lengths.
    """

    actors: Actors
    accelerator: Accelerator
    args: Any
    temperature: float
    pads: bool = True

    def backward(self, batch: MicroBatch) -> Stats:
        """Add a micro-batch's gradients; its statistics, scalars by name.

        A part's graph is gone before the next one's is built; the parts' gradients add up to the whole's.
        """
        masks = batch.rollout.masks()
        counts = tuple(mask[batch.rows].sum().clamp(min=1) for mask in masks)
        stats: Stats = defaultdict(lambda: torch.zeros((), device=counts[0].device))
        every = self._parts(batch.rollout, batch.rows)
        for i, rows in enumerate(every):
            passage = Passage.of(batch.rollout, rows)
            part = self._one_trunk if self.actors.one_trunk else self._two_passes
            with self._attention():
                found = part(batch, passage, counts, last=i == len(every) - 1)
            for name, value in found.items():
                stats[name] = stats[name] + value
        stats["val/ratio"] = stats["val/ratio"] + 1  # of the distance from 1, which padding has not
        return dict(stats)

    def rehearse(self, pairs: Rollout, coef: float) -> torch.Tensor:
        """Add the gradients of ``coef`` times the mean NLL of the response tokens (Peng et al. 2023).

        To be called once an optimizer step, before its last micro-batch.

        Args:
            pairs: Of which prompts and responses are read; at least one token of a response.
            coef: gamma.

        Returns:
            The NLL, nats a token, a scalar.
        """
        nll, tokens = torch.zeros((), device=pairs.lengths.device), pairs.lengths.sum()
        # Accelerate divides by the number of micro-batches, and there is one rehearsal for all of them.
        scale = coef * self.accelerator.gradient_accumulation_steps
        for micro_batch in pairs.by_length(torch.arange(len(pairs.prompts))).split(
            self.args.per_device_train_batch_size
        ):
            for rows in self._parts(pairs, micro_batch):
                with self._attention(), self.actors.playing("policy"):
                    with autocast(self.args, self.accelerator.device):
                        logprobs, _ = passes.logprobs(self.actors, "policy", Passage.of(pairs, rows), 1.0)
                    part = -logprobs.sum() / tokens
                    self._backward(scale * part, last=False)
                nll += part.detach()
        return nll

    def _attention(self) -> AbstractContextManager:
        return trainable_attention(*self.actors.trained()) if self.args.bf16 else nullcontext()

    def _parts(self, rollout: Rollout, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows in parts, of which there are equally many in processes that go through them side by side."""
        groups = [rows] if self.pads else passes.equal_prompts(rollout.prompt_mask, rows)
        found = [part for group in groups for part in parts(rollout, group, self.args.micro_batch_tokens)]
        if self.args.micro_batch_tokens is not None or not self.pads:
            for _ in range(equal_count(self.accelerator, len(found)) - len(found)):
                largest = max(range(len(found)), key=lambda i: len(found[i]))
                found[largest : largest + 1] = found[largest].tensor_split(2)
        return found

    def _two_passes(
        self, batch: MicroBatch, passage: Passage, counts: tuple[torch.Tensor, ...], *, last: bool
    ) -> Stats:
        """The value's graph is gone before the policy's is built."""
        with self.actors.playing("value"):
            with autocast(self.args, self.accelerator.device):
                values = passes.values(self.actors, passage)
            v_loss, stats = self._value_loss(batch, passage, values, counts[1])
            self._backward(v_loss, last=False)
        with self.actors.playing("policy"):
            with autocast(self.args, self.accelerator.device):
                logprobs, entropy = passes.logprobs(self.actors, "policy", passage, self.temperature)
            p_loss, policy_stats = self._policy_loss(batch, passage, logprobs, entropy, counts[0])
            self._backward(p_loss, last=last)
        return stats | policy_stats

    def _one_trunk(self, batch: MicroBatch, passage: Passage, counts: tuple[torch.Tensor, ...], *, last: bool) -> Stats:
        with self.actors.playing("policy"):
            with autocast(self.args, self.accelerator.device):
                logprobs, entropy, values = passes.together(self.actors, passage, self.temperature)
            v_loss, stats = self._value_loss(batch, passage, values, counts[1])
            p_loss, policy_stats = self._policy_loss(batch, passage, logprobs, entropy, counts[0])
            self._backward(p_loss + v_loss, last=last)
        return stats | policy_stats

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        backward(self.accelerator, loss, last=last)

    def _value_loss(
        self, batch: MicroBatch, passage: Passage, values: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        old, returns = (x[passage.rows, : passage.value_width] for x in (batch.rollout.values, batch.returns))
        loss, clipped = losses.value_loss(values, old, returns, passage.value_mask, self.args.cliprange_value, count)
        stats = {"loss/value_avg": loss.detach(), "val/clipfrac_avg": clipped}
        return self.args.vf_coef * loss * batch.weight, stats

    def _policy_loss(
        self,
        batch: MicroBatch,
        passage: Passage,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        count: torch.Tensor,
    ) -> tuple[torch.Tensor, Stats]:
        old, advantages = (x[passage.rows, : passage.width] for x in (batch.rollout.logprobs, batch.advantages))
        loss, clipped = losses.policy_loss(logprobs, old, advantages, passage.mask, self.args.cliprange, count)
        # The parent's means go over all positions, padding too.
        positions = len(batch.rows) * batch.rollout.response_ids.shape[1]
        with torch.no_grad():
            difference = logprobs - old
            stats = {
                "loss/policy_avg": loss.detach(),
                "policy/clipfrac_avg": clipped,
                "policy/approxkl_avg": 0.5 * (difference**2).sum() / positions,
                "policy/entropy_avg": entropy.sum() / count,
                "val/ratio": (difference.exp() - 1).sum() / positions,
            }
        return loss * batch.weight, stats
