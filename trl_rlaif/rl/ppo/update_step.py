"""One update: its optimizer steps, and a micro-batch's gradients, of separate policy and value or a shared trunk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from trl_rlaif.distributed import average_gradients, backward, equal_parts
from trl_rlaif.models import forward
from trl_rlaif.models.forward import RolloutSlice
from trl_rlaif.models.kernels import autocast
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.models.safe_training import check_gradients
from trl_rlaif.rl.ppo import losses
from trl_rlaif.types import Responses, Rollout

Stats = dict[str, torch.Tensor]
# Default tokens per pass on a CPU: matrix products are no faster with more of them.
CPU_TOKENS = 512
# The statistic that max_update_kl limits; it is not logged.
_UPDATE_KL = "update_kl"


class Divisors(NamedTuple):
    """Divisors of the sums over a micro-batch's tokens, scalars.

    Accelerate averages the quotients over the micro-batches of a minibatch, and gradients are averaged over processes:
    the divisors account for both.

    Args:
        policy: Of the policy's loss, clip fraction and entropy.
        value: Of the value's loss and clip fraction.
        logged: Of ``policy/approxkl_avg`` and ``val/ratio``.
        tokens: Of the KL that ``max_update_kl`` limits.
    """

    policy: torch.Tensor
    value: torch.Tensor
    logged: torch.Tensor
    tokens: torch.Tensor


def divisors_of(
    rollout: Rollout,
    micro_batches: Sequence[torch.Tensor],
    accelerator: Accelerator,
    reduction: Literal["minibatch", "micro_batch"] = "minibatch",
) -> list[Divisors]:
    """The divisors of each micro-batch of one minibatch. A collective call: all processes must make it.

    Args:
        micro_batches: Rows of the rollout, (b,) int64 each; this process's.
        reduction: ``minibatch`` gives every token of the minibatch the same weight, in all micro-batches and processes.
            ``micro_batch`` is TRL's: a mean over each micro-batch; logged statistics include its padding.
    """
    learned, rows = rollout.learned(), torch.cat(list(micro_batches))
    counts = torch.stack([mask[rows].sum() for mask in (*learned, rollout.masks()[0])]).float()
    shares = len(micro_batches) * accelerator.num_processes
    policy, value, tokens = accelerator.reduce(counts, "sum").clamp(min=1) / shares
    if reduction == "minibatch":
        return [Divisors(policy, value, tokens, tokens)] * len(micro_batches)
    positions = tokens.new_tensor(len(rows) * rollout.response_ids.shape[1] / len(micro_batches))
    found = []
    for part in micro_batches:
        weight = len(part) * len(micro_batches) / len(rows)  # the last one may be smaller
        policy, value = (mask[part].sum().clamp(min=1) / weight for mask in learned)
        found.append(Divisors(policy, value, positions, tokens))
    return found


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a rollout whose gradients are computed together.

    Args:
        advantages, returns: (B, T) float32 of the whole rollout.
        rows: (b,) int64, its rows.
        divisors: Of sums over its tokens.
    """

    rollout: Rollout
    advantages: torch.Tensor
    returns: torch.Tensor
    rows: torch.Tensor
    divisors: Divisors


def parts(responses: Responses, rows: torch.Tensor, tokens: int | None) -> Iterator[torch.Tensor]:
    """Split rows into parts of at most this many tokens, padding included, and at least one row."""
    if tokens is None:
        yield rows
        return
    prompts, lengths = responses.prompt_lengths, responses.response_lengths
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
class PPOStep:
    """PPO's losses on the role models (Schulman et al. 2017, eq. 7 and 9), and their backward passes.

    Args:
        pads: Whether a forward pass may mix prompts of different lengths.
    """

    role_models: RoleModels
    accelerator: Accelerator
    args: Any
    temperature: float
    pads: bool = True

    def backward(self, batch: MicroBatch) -> Stats:
        """Add a micro-batch's gradients; returns its statistics, scalars by name.

        Each part's graph is freed before the next one is built; the parts' gradients add up to the whole's.
        """
        stats: Stats = defaultdict(lambda: torch.zeros((), device=batch.rollout.lengths.device))
        every = self._parts(batch.rollout, batch.rows)
        for i, rows in enumerate(every):
            rollout_slice = RolloutSlice.of(batch.rollout, rows)
            part = self._one_trunk if self.role_models.one_trunk else self._two_passes
            found = part(batch, rollout_slice, last=i == len(every) - 1)
            for name, value in found.items():
                stats[name] = stats[name] + value
        stats["val/ratio"] = stats["val/ratio"] + 1  # parts sum the distance from 1, which is 0 for padding
        return dict(stats)

    def rehearse(self, pairs: Responses, coef: float) -> torch.Tensor:
        """Add the gradients of ``coef`` times the mean NLL of the response tokens (Peng et al. 2023).

        To be called once per optimizer step, before its last micro-batch.

        Args:
            pairs: Their prompts and responses are read; at least one response token.
            coef: The rehearsal weight.

        Returns:
            The NLL, nats per token, a scalar.
        """
        nll = torch.zeros((), device=pairs.lengths.device)
        # All tokens of all processes have equal weight; gradients and the logged NLL are averaged over processes.
        tokens = self.accelerator.reduce(pairs.lengths.sum().float(), "sum") / self.accelerator.num_processes
        # Accelerate divides by the number of micro-batches, and there is one rehearsal for all of them.
        scale = coef * self.accelerator.gradient_accumulation_steps
        for micro_batch in pairs.by_length(torch.arange(len(pairs.prompts))).split(
            self.args.per_device_train_batch_size
        ):
            for rows in self._parts(pairs, micro_batch):
                with self.role_models.role("policy"):
                    with autocast(self.args, self.accelerator.device):
                        logprobs, _ = forward.logprobs(self.role_models, "policy", RolloutSlice.of(pairs, rows), 1.0)
                    part = -logprobs.sum() / tokens
                    self._backward(scale * part, last=False)
                nll += part.detach()
        return nll

    def _parts(self, responses: Responses, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows in parts, equally many in processes that must step through them together."""
        groups = [rows] if self.pads else forward.equal_prompts(responses.prompt_mask, rows)
        limit = self.args.micro_batch_tokens
        if limit is None and self.accelerator.device.type == "cpu":
            limit = CPU_TOKENS
        found = [part for group in groups for part in parts(responses, group, limit)]
        return found if limit is None and self.pads else equal_parts(self.accelerator, found)

    def _two_passes(self, batch: MicroBatch, rollout_slice: RolloutSlice, *, last: bool) -> Stats:
        """The value's graph is freed before the policy's is built."""
        with self.role_models.role("value"):
            with autocast(self.args, self.accelerator.device):
                values = forward.values(self.role_models, rollout_slice)
            v_loss, stats = self._value_loss(batch, rollout_slice, values)
            self._backward(v_loss, last=False)
        with self.role_models.role("policy"):
            with autocast(self.args, self.accelerator.device):
                logprobs, entropy = forward.logprobs(self.role_models, "policy", rollout_slice, self.temperature)
            p_loss, policy_stats = self._policy_loss(batch, rollout_slice, logprobs, entropy)
            self._backward(p_loss, last=last)
        return stats | policy_stats

    def _one_trunk(self, batch: MicroBatch, rollout_slice: RolloutSlice, *, last: bool) -> Stats:
        with self.role_models.role("policy"):
            with autocast(self.args, self.accelerator.device):
                logprobs, entropy, values = forward.policy_and_value(self.role_models, rollout_slice, self.temperature)
            v_loss, stats = self._value_loss(batch, rollout_slice, values)
            p_loss, policy_stats = self._policy_loss(batch, rollout_slice, logprobs, entropy)
            self._backward(p_loss + v_loss, last=last)
        return stats | policy_stats

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        backward(self.accelerator, loss, last=last)

    def _value_loss(
        self, batch: MicroBatch, rollout_slice: RolloutSlice, values: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        old, returns = (
            x[rollout_slice.rows, : rollout_slice.value_width] for x in (batch.rollout.values, batch.returns)
        )
        mask, clip = rollout_slice.learned[1], self.args.cliprange_value
        loss, clipped = losses.value_loss(values, old, returns, mask, clip, batch.divisors.value)
        stats = {"loss/value_avg": loss.detach(), "val/clipfrac_avg": clipped}
        return self.args.vf_coef * loss, stats

    def _policy_loss(
        self,
        batch: MicroBatch,
        rollout_slice: RolloutSlice,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
    ) -> tuple[torch.Tensor, Stats]:
        old, advantages = (
            x[rollout_slice.rows, : rollout_slice.width] for x in (batch.rollout.logprobs, batch.advantages)
        )
        mask, clip, divisors = rollout_slice.learned[0], self.args.cliprange, batch.divisors
        loss, clipped = losses.policy_loss(logprobs, old, advantages, mask, clip, divisors.policy)
        with torch.no_grad():
            difference = logprobs - old
            squares = 0.5 * (difference**2).sum()
            stats = {
                "loss/policy_avg": loss.detach(),
                "policy/clipfrac_avg": clipped,
                "policy/approxkl_avg": squares / divisors.logged,
                "policy/entropy_avg": (entropy * mask).sum() / divisors.policy,
                "val/ratio": (difference.exp() - 1).sum() / divisors.logged,
                _UPDATE_KL: squares / divisors.tokens,
            }
        return loss, stats


class PPOUpdate:
    """All optimizer steps of an update: epochs over shuffled minibatches, each of them in micro-batches.

    Args:
        args: Epochs, batch sizes, ``max_update_kl`` and ``loss_reduction``.
        accelerator: Of all processes.
        model, optimizer: What is trained, as accelerate prepared it.
        seed: Of the minibatches' order.
    """

    def __init__(self, args: Any, accelerator: Accelerator, model: nn.Module, optimizer: Any, seed: int) -> None:
        self.args, self.accelerator, self.model, self.optimizer = args, accelerator, model, optimizer
        self._order = torch.Generator().manual_seed(seed)

    def run(
        self,
        rollout: Rollout,
        micro_step: Callable[[torch.Tensor, Divisors], Stats],
        rehearse: Callable[[], torch.Tensor] | None,
        number: int,
    ) -> dict[str, list[torch.Tensor]]:
        """Take the steps.

        Args:
            micro_step: Adds the gradients of some rows of the rollout, and returns their statistics.
            rehearse: Adds the gradients of the rehearsal pairs to an optimizer step, and returns their NLL.
            number: Of the update, from 1, for messages.

        Returns:
            Scalars by name, of each minibatch or, with TRL's means, of each micro-batch; and ``policy/epochs``.
        """
        args, accelerator = self.args, self.accelerator
        # An optimizer step for each minibatch; TRL's would also step in every micro-batch that falls on the last batch
        # of the dataloader. Set here: accelerate shares this state among all trainers of a process.
        micro = -(-args.local_mini_batch_size // args.per_device_train_batch_size)
        accelerator.gradient_state.plugin_kwargs.update(num_steps=micro, sync_with_dataloader=False)
        stats: dict[str, list[torch.Tensor]] = defaultdict(list)
        for epoch in range(args.num_ppo_epochs):
            order = torch.randperm(args.local_batch_size, generator=self._order)
            for minibatch in order.split(args.local_mini_batch_size):
                found = self._minibatch(rollout, minibatch, micro_step, rehearse, number)
                moved = found.pop(_UPDATE_KL, [])
                for name, values in found.items():
                    stats[name] += values
            stats["policy/epochs"] = [torch.tensor(epoch + 1.0, device=rollout.lengths.device)]
            limit = args.max_update_kl  # on the KL at the epoch's last minibatch, over all processes
            if limit is not None and accelerator.gather(torch.stack(moved)).mean().item() > limit:
                break
        return stats

    def _minibatch(
        self, rollout: Rollout, minibatch: torch.Tensor, micro_step: Any, rehearse: Any, number: int
    ) -> dict[str, list[torch.Tensor]]:
        """One optimizer step over some of this process's rows, (N,) int64."""
        args = self.args
        stats: dict[str, list[torch.Tensor]] = defaultdict(list)
        micro_batches = rollout.by_length(minibatch).split(args.per_device_train_batch_size)
        every = divisors_of(rollout, micro_batches, self.accelerator, args.loss_reduction)
        for rows, divisors in zip(micro_batches, every, strict=True):
            with self.accelerator.accumulate(self.model):
                if rehearse is not None and self.accelerator.sync_gradients:
                    stats["rehearsal/nll"].append(rehearse())
                step = micro_step(rows, divisors)
                average_gradients(self.accelerator, self.model)
                if self.accelerator.sync_gradients:
                    check_gradients(self.model, number)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in step.items():
                stats[name].append(value)
        if args.loss_reduction == "micro_batch":
            return stats
        return {name: [torch.stack(values).mean()] for name, values in stats.items()}

    def state_dict(self) -> dict[str, Any]:
        """The generator of the minibatches' order, for this process."""
        return {"minibatch_order": self._order.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the generator."""
        self._order.set_state(state["minibatch_order"])
