"""Generates rollouts: the policy's responses, with the outputs of the reference, value and reward models."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from trl_rlaif.distributed import failing_together
from trl_rlaif.generation import random_state, set_random_state
from trl_rlaif.models import forward
from trl_rlaif.models.forward import RolloutSlice
from trl_rlaif.models.kernels import autocast, generation_kernels
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.responses import ResponseReader
from trl_rlaif.rl import verification
from trl_rlaif.rl.rollouts import generate, response_lengths, scored_rows, unpadded
from trl_rlaif.rl.vllm import VLLMSampler, check_installed
from trl_rlaif.rl.vllm_adapter import AdapterSampler
from trl_rlaif.types import Responses, Rollout

if TYPE_CHECKING:
    from trl_rlaif.rl.ppo.config import PPOConfig


logger = logging.getLogger(__name__)

# Kinds of rollouts that are verified once each.
_ANY, _PADDED = "any", "padded"


class RolloutGenerator:
    """Samples responses and runs the forward passes without gradient.

    The first rollout, and the first with padded prompts, is compared with plain forward passes of a few of its rows:
    with some models, transformers itself is wrong for left-padded prompts, or with a cache.

    Args:
        args: Response length, batch sizes and temperature.
        accelerator: Its device is used. All processes sample equally often and decide together.
        reader: Parses responses; without stop tokens, they are sampled to the full length.

    Attributes:
        pads: Whether a batch may mix prompts of different lengths. False once padding has changed the numbers.
        records: Whether the log-probabilities recorded while sampling are used. False once they were wrong, and with
            vLLM; a forward pass then computes them.
    """

    def __init__(self, args: PPOConfig, accelerator: Accelerator, reader: ResponseReader) -> None:
        self.args, self.accelerator, self.reader, self.tokenizer = args, accelerator, reader, reader.tokenizer
        self.temperature = args.temperature + 1e-7  # as in TRL, so that temperature 0 is greedy
        self._vllm = _vllm_sampler(args, accelerator, reader) if args.generation == "vllm" else None
        self.pads, self.records = True, self._vllm is None
        self._unverified = {_ANY, _PADDED}

    @torch.no_grad()
    def draw(self, role_models: RoleModels, batch: dict[str, Any]) -> Rollout:
        """One response to each prompt of a batch from PromptCollator.

        Raises:
            UserError: The model's log-probabilities are wrong even without padding and without a cache.
        """
        kinds = self._to_verify(batch["attention_mask"])
        before = random_state() if kinds else None
        rollout = self._draw(role_models, batch)
        while kinds and not self._verify(role_models, rollout, padded=_PADDED in kinds):
            set_random_state(before)  # a resumed run verifies again, and must draw the same
            rollout = self._draw(role_models, batch)
        return rollout

    def _to_verify(self, mask: torch.Tensor) -> set[str]:
        """The kinds of a rollout, over all processes; empty if they were all verified before."""
        if not self._unverified:
            return set()
        padded = torch.tensor([bool((mask == 0).any())], device=self.accelerator.device)
        kinds = {_ANY, _PADDED} if self.accelerator.gather(padded).any() else {_ANY}
        due = kinds & self._unverified
        self._unverified -= kinds
        return kinds if due else set()

    def _verify(self, role_models: RoleModels, rollout: Rollout, *, padded: bool) -> bool:
        """Whether the log-probabilities are right; if not, they are computed differently from here on."""
        with failing_together(self.accelerator):
            forward = self._forward(role_models, rollout, verification.chosen_rows(rollout))
            computed = rollout.logprobs, forward, rollout.ref_logprobs
            own = verification.deviations(
                role_models, rollout, computed, self.args, self.accelerator.device, self.temperature
            )
        found, limit = verification.worst(own, self.accelerator), verification.tolerance(role_models, self.args)
        name = type(role_models.model("policy")).__name__
        if found.within(limit):
            return True
        if self.pads and padded:
            self.pads = False
            logger.warning(verification.PADDING, name, found)
        elif self.records and found.forward_within(limit) and found.sampling <= verification.MOST:
            self.records = False
            logger.warning(verification.CACHE, name, found)
        else:
            raise verification.error(name, found, limit)
        return False

    def _draw(self, role_models: RoleModels, batch: dict[str, Any]) -> Rollout:
        device = self.accelerator.device
        prompt_ids = batch["input_ids"].to(device)
        prompt_mask = batch["attention_mask"].to(device).bool()
        if self._vllm is None:
            response_ids, logprobs = self._generate(role_models, prompt_ids, prompt_mask)
        else:
            response_ids, logprobs = self._vllm.generate(role_models, prompt_ids, prompt_mask, self.temperature), None
        pad_id = self.tokenizer.pad_token_id
        lengths, _ = response_lengths(response_ids, stop_ids=self.reader.stop_ids, pad_id=pad_id)
        rows = unpadded(prompt_ids, prompt_mask, response_ids, lengths)
        responses = [self.reader.read(response, prompt) for prompt, response in rows]
        zeros = torch.zeros(response_ids.shape, device=device)
        rollout = Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            lengths=lengths,
            ended=torch.tensor([response.ended for response in responses], device=device),
            logprobs=zeros if logprobs is None else logprobs,
            ref_logprobs=zeros,
            values=zeros,
            prompts=batch["prompt"],
            completions=[r.as_completion(prompt) for r, prompt in zip(responses, batch["prompt"], strict=True)],
            columns=batch["columns"],
        )
        if not self.records:
            # Another engine's are not used: its kernels and precision differ, and PPO's ratio divides by these.
            # The ratio is 1 at the first step only if the trained model computed both.
            rollout = replace(rollout, logprobs=self._forward(role_models, rollout, torch.arange(len(lengths))))
        return self._judged(role_models, rollout)

    def _generate(
        self, role_models: RoleModels, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pad_id, model = self.tokenizer.pad_token_id, role_models.model("policy")
        batches = self._prompt_batches(prompt_mask)
        with role_models.role("policy"), generation_kernels(model, self.args.bf16):
            drawn = [
                generate(
                    model,
                    prompt_ids[rows, first:],
                    prompt_mask[rows, first:],
                    max_new_tokens=self.args.response_length,
                    temperature=self.temperature,
                    pad_id=pad_id,
                    stop_id=self.reader.stop_ids,
                )
                for rows, first in batches
            ]
        width = max(ids.shape[1] for ids, _ in drawn)
        order = torch.cat([rows for rows, _ in batches]).argsort()
        return (
            torch.cat([pad(ids, (0, width - ids.shape[1]), value=pad_id) for ids, _ in drawn])[order],
            torch.cat([pad(logprobs, (0, width - logprobs.shape[1])) for _, logprobs in drawn])[order],
        )

    def _prompt_batches(self, mask: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """Rows that are sampled together, and the column where their prompts begin."""
        rows, size = torch.arange(len(mask)), self.args.local_rollout_forward_batch_size
        if self.pads:
            return [(part, 0) for part in rows.split(size)]
        groups = forward.equal_prompts(mask, rows)
        return [(part, int(mask[part[0]].int().argmax())) for group in groups for part in group.split(size)]

    @torch.no_grad()
    def kl(self, role_models: RoleModels, responses: Responses) -> torch.Tensor:
        """(B,) float32, each response's summed log-ratios to the reference in nats, by a forward pass of each model."""
        rows = torch.arange(len(responses.prompts))
        reference, policy = (self._forward(role_models, responses, rows, part) for part in ("reference", "policy"))
        return ((policy - reference) * responses.masks()[0]).sum(1)

    def _forward(
        self, role_models: RoleModels, responses: Responses, rows: torch.Tensor, part: str = "policy"
    ) -> torch.Tensor:
        """(B, T) float32: log-probabilities of some rows by a forward pass, as in a training step; else zero."""
        logprobs = torch.zeros(responses.response_ids.shape, device=responses.response_ids.device)
        for chunk in self._chunks(responses, rows):
            rollout_slice = RolloutSlice.of(responses, chunk)
            with autocast(self.args, self.accelerator.device):
                found, _ = forward.logprobs(role_models, part, rollout_slice, self.temperature)
            logprobs[chunk, : rollout_slice.width] = found
        return logprobs

    def _judged(self, role_models: RoleModels, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probabilities and the values; zero after the ends."""
        mask, value_mask = rollout.masks()
        references, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
        for rows in self._chunks(rollout):
            rollout_slice = RolloutSlice.of(rollout, rows)
            with autocast(self.args, self.accelerator.device):
                found, _ = forward.logprobs(role_models, "reference", rollout_slice, self.temperature)
                if role_models.has_value:
                    values[rows, : rollout_slice.value_width] = forward.values(role_models, rollout_slice)
            references[rows, : rollout_slice.width] = found
        return replace(
            rollout,
            logprobs=rollout.logprobs.masked_fill(~mask, 0),
            ref_logprobs=references,
            values=values.masked_fill(~value_mask, 0),
        )

    @torch.no_grad()
    def scores(self, role_models: RoleModels, responses: Responses) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reward model's score of each response, and e(x) if it has that head: (B,) float32 each."""
        if self.reader.stop_ids and self.args.score_at_end:
            responses = scored_rows(responses, self.reader)
        found, order = [], []
        for rows in self._chunks(responses):
            rollout_slice = RolloutSlice.of(responses, rows)
            with autocast(self.args, self.accelerator.device):
                found.append(forward.scores(role_models, rollout_slice))
            order.append(rows)
        scores = torch.cat(found)[torch.cat(order).argsort()]
        return scores[:, 0], scores[:, 1] if scores.shape[1] > 1 else None

    def _chunks(self, responses: Responses, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Rows of similar length together, as many as in a training step: little or no padding is computed."""
        rows = responses.by_length(torch.arange(len(responses.prompts)) if rows is None else rows)
        groups = [rows] if self.pads else forward.equal_prompts(responses.prompt_mask, rows)
        return [part for group in groups for part in group.split(self.args.per_device_train_batch_size)]


def _vllm_sampler(args: PPOConfig, accelerator: Accelerator, reader: ResponseReader) -> VLLMSampler:
    check_installed()
    kind = AdapterSampler if args.vllm_sync == "adapter" else VLLMSampler
    return kind(args, accelerator, reader.tokenizer, reader.stop_ids)
