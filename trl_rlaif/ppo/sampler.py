"""Fills rollouts: responses of the policy, and what reference, value and reward model say of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from trl_rlaif.compute.cpu_attention import trainable_attention
from trl_rlaif.compute.lean_lora import held_adapter
from trl_rlaif.compute.precision import autocast, held_head
from trl_rlaif.events import Rollout
from trl_rlaif.ppo import passes
from trl_rlaif.ppo.actors import Actors
from trl_rlaif.ppo.passes import Passage
from trl_rlaif.ppo.rollout import end_of_turn_rows, generate, response_lengths
from trl_rlaif.ppo.vllm import VLLMSampler
from trl_rlaif.stopping import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trl_rlaif.ppo.config import PPOConfig


class RolloutSampler:
    """Draws responses and runs the forward passes without gradient.

    Args:
        args: Response length, batch sizes and temperature.
        accelerator: Its device is used.
        tokenizer: Padding, and decoding of responses.
        stop_ids: The tokens that end a response; without any, it is sampled to the full length.
    """

    def __init__(
        self, args: PPOConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
    ) -> None:
        self.args, self.accelerator, self.tokenizer, self.stop_ids = args, accelerator, tokenizer, stop_ids
        self.temperature = args.temperature + 1e-7  # the parent's, so that temperature 0 is greedy
        self._vllm = VLLMSampler(args, accelerator, tokenizer, stop_ids) if args.generation == "vllm" else None

    @torch.no_grad()
    def draw(self, actors: Actors, batch: dict[str, Any]) -> Rollout:
        """One response for each prompt of a batch of PromptCollator's."""
        device = self.accelerator.device
        prompt_ids = batch["input_ids"].to(device)
        prompt_mask = batch["attention_mask"].to(device).bool()
        if self._vllm is None:
            response_ids, logprobs = self._generate(actors, prompt_ids, prompt_mask)
        else:
            response_ids, logprobs = self._vllm.generate(actors, prompt_ids, prompt_mask, self.temperature), None
        lengths, ended = response_lengths(response_ids, stop_ids=self.stop_ids, pad_id=self.tokenizer.pad_token_id)
        zeros = torch.zeros(response_ids.shape, device=device)
        rollout = Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            lengths=lengths,
            ended=ended,
            logprobs=zeros if logprobs is None else logprobs,
            ref_logprobs=zeros,
            values=zeros,
            prompts=batch["prompt"],
            completions=self._decode(response_ids, lengths - ended.long(), batch["prompt"]),
            columns=batch["columns"],
        )
        return self._judged(actors, rollout if logprobs is not None else self._with_logprobs(actors, rollout))

    def _generate(
        self, actors: Actors, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, pad_id = self.args.local_rollout_forward_batch_size, self.tokenizer.pad_token_id
        model = actors.model("policy")
        precision = autocast(self.args, self.accelerator.device)
        with actors.playing("policy"), precision, held_head(model), held_adapter(model):
            drawn = [
                generate(
                    model,
                    ids,
                    mask,
                    max_new_tokens=self.args.response_length,
                    temperature=self.temperature,
                    pad_id=pad_id,
                    stop_ids=self.stop_ids,
                )
                for ids, mask in zip(prompt_ids.split(size), prompt_mask.split(size), strict=True)
            ]
        width = max(ids.shape[1] for ids, _ in drawn)
        return (
            torch.cat([pad(ids, (0, width - ids.shape[1]), value=pad_id) for ids, _ in drawn]),
            torch.cat([pad(logprobs, (0, width - logprobs.shape[1])) for _, logprobs in drawn]),
        )

    def _decode(self, ids: torch.Tensor, lengths: torch.Tensor, prompts: list[Any]) -> list[Any]:
        rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _with_logprobs(self, actors: Actors, rollout: Rollout) -> Rollout:
        """The rollout with the policy's log-probabilities, of responses that another engine drew.

        That engine's own are not taken: its kernels and its precision differ, and PPO's ratio divides by these. It
        is 1 at the first step only if the model that is trained has said both.
        """
        logprobs = torch.zeros_like(rollout.logprobs)
        with trainable_attention(*actors.trained()) if self.args.bf16 else nullcontext():  # as in the step
            for rows in self._chunks(rollout):
                passage = Passage.of(rollout, rows)
                with autocast(self.args, self.accelerator.device):
                    found, _ = passes.logprobs(actors, "policy", passage, self.temperature)
                logprobs[rows, : passage.width] = found
        return replace(rollout, logprobs=logprobs)

    def _judged(self, actors: Actors, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probabilities and the values; zero behind the ends."""
        mask, value_mask = rollout.masks()
        references, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
        for rows in self._chunks(rollout):
            passage = Passage.of(rollout, rows)
            with autocast(self.args, self.accelerator.device):
                found, _ = passes.logprobs(actors, "reference", passage, self.temperature)
                values[rows, : passage.value_width] = passes.values(actors, passage)
            references[rows, : passage.width] = found
        return replace(
            rollout,
            logprobs=rollout.logprobs.masked_fill(~mask, 0),
            ref_logprobs=references,
            values=values.masked_fill(~value_mask, 0),
        )

    @torch.no_grad()
    def scores(self, actors: Actors, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reward model's score of each response, and e(x) where it has one: (B,) float32 each."""
        if self.stop_ids and self.args.score_at_end:
            rollout = end_of_turn_rows(rollout, end_of_turn(self.tokenizer))
        found, order = [], []
        for rows in self._chunks(rollout):
            passage = Passage.of(rollout, rows)
            with autocast(self.args, self.accelerator.device):
                found.append(passes.scores(actors, passage))
            order.append(rows)
        scores = torch.cat(found)[torch.cat(order).argsort()]
        return scores[:, 0], scores[:, 1] if scores.shape[1] > 1 else None

    def _chunks(self, rollout: Rollout) -> tuple[torch.Tensor, ...]:
        """Rows of like length together, as many as a training step holds: little padding is computed."""
        return rollout.by_length(torch.arange(len(rollout.prompts))).split(self.args.per_device_train_batch_size)
