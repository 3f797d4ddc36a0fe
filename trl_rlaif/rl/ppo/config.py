"""Settings of the PPO loop."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

from trl_rlaif.compat.ppo_config import setting
from trl_rlaif.compat.trl_ppo import BasePPOConfig
from trl_rlaif.errors import Problem, UserError
from trl_rlaif.hardware import settle_bf16


@dataclass
class PPOConfig(BasePPOConfig):
    """TRL 1.12's PPOConfig with additional fields.

    The defaults follow TRL except for three: ``score_at_end=False`` and ``loss_reduction="micro_batch"`` restore the
    numbers of TRL's trainer, and ``bf16`` is on only if the machine computes bfloat16 fast.

    Args:
        bf16: bfloat16 autocast; None: if the machine computes it fast.
        max_prompt_length: Maximum prompt length in tokens; longer prompts are left out, counted and reported.
            None: what ``response_length`` leaves of the model's context.
        stop_tokens: Tokens that end a response, instead of ``stop_token``. With ``stop_token: eos``, the model's own
            tokens end it: the end of turn of its chat template, its eos, and those of its generation config.
        score_at_end: Have the reward model score every response at its end of turn, as in its training on whole
            responses; a response that was cut off at ``response_length`` gets that token appended. False: score it as
            sampled, as TRL does.
        chat_template_kwargs: Variables for the chat template of conversational prompts, such as ``enable_thinking``; a
            column of that name overrides them per row, as in TRL.
        reasoning: ``strip`` removes a response's reasoning from what the reward model, functions, judges and selectors
            see; ``keep`` leaves it there. A response whose reasoning never ends counts as cut off.
        reasoning_tags: Opening and closing tag of reasoning; None: those of the chat template.
        value: How the value is computed on a shared base: by an ``adapter`` of its own, or by a head on the policy's
            hidden states, ``trunk`` (no second forward and backward pass, but both share their features).
        micro_batch_tokens: Maximum number of tokens, padding included, in one forward and backward pass. A larger
            micro-batch is split; the gradients add up to the same. None: 512 on a CPU, where larger passes are not
            faster, and no limit on a GPU.
        loss_reduction: ``minibatch`` averages the losses over all tokens of an optimizer step, across micro-batches and
            processes: halving per_device_train_batch_size and doubling gradient_accumulation_steps changes no gradient.
            ``micro_batch`` averages within each micro-batch and then over micro-batches, as TRL's trainer does.
        kl_weighting: ``additive`` is score - beta * KL (Peng et al. 2023), ``weighted`` is (1 - beta) * score -
            beta * KL (Lee et al. 2023).
        kl_target: Target KL to the reference, in nats per response, for adapting ``kl_coef`` (Ziegler et al. 2019,
            sec. 2.2); None keeps ``kl_coef`` fixed.
        kl_horizon: Number of episodes over which the adaptation of ``kl_coef`` takes effect.
        max_update_kl: Skip an update's remaining epochs once the approximate KL between the current policy and the
            sampling policy exceeds this on the last minibatch of an epoch, in nats per response token.
        reward_weights: Weights of the reward model, if there is one, then of ``reward_funcs`` in their order; None: 1
            each.
        reward_normalization: Normalization of each reward before the weighted sum: ``none``; ``std``, division by the
            standard deviation of all its values so far; ``batch``, standardization within each batch (see
            ``RewardSum``).
        max_failed: Fraction of an update's responses, 0 to 1, that may have no reward or that a judge may fail to rate.
            Beyond it, the run saves a checkpoint and stops. With smaller updates, the last 100 responses are counted.
            Responses without a reward are left out of losses, whitening and reward transforms.
        reward_timeout: Seconds that each reward function may take for one batch, counted from its own start.
            Asynchronous functions run concurrently and are checked once the others have returned. A function that takes
            longer ends the run with its name (and the names of waiting functions, if it blocks their event loop). None:
            no limit.
        whiten_scores: Scale each batch's scores to zero mean and unit variance.
        score_clip: Clip scores to plus and minus this, after whitening; > 0.
        length_penalty: Penalty on the score of a response of full length; proportionally less for shorter ones.
        selection_prompts: Number of random prompts whose responses the data selectors see; None: all.
        selection_every: Select again after this many updates, from responses of the then current policy; None: once.
        rehearsal_coef: The rehearsal weight: of the rehearsed pairs' NLL in the loss (gamma in Peng et al. 2023).
        rehearsal_schedule: ``constant``, or the weight decays to zero over the run: ``linear``, or ``cosine`` (half a
            period).
        rehearsal_batch_size: Rehearsed pairs per optimizer step and process; None: a quarter of a minibatch, or an
            eighth with ``value: trunk``.
        generation: Backend that generates responses: ``transformers``, or ``vllm`` through TRL's integration. The old
            log-probabilities are the policy's own in both cases.
        vllm_*: As in TRL's GRPOConfig, for the server or the colocated engine, depending on ``vllm_mode``. Prompts that
            leave no room for the response in ``vllm_max_model_length`` are left out.
        vllm_sync: What a colocated engine is given after an update: ``merged`` weights, all of them, through TRL's
            integration; or the ``adapter`` alone, as a LoRA request to an engine that keeps the base. In one process,
            on a base that is not in 4 bits.
    """

    bf16: bool | None = setting(None, "bfloat16 autocast; None: if the machine computes it fast.")
    max_prompt_length: int | None = setting(
        None, "Maximum prompt length in tokens; longer prompts are left out, counted and reported."
    )
    stop_tokens: list[str] | None = setting(None, "Tokens that end a response, instead of the model's own.")
    score_at_end: bool = setting(True, "Score cut-off responses with the end of turn appended; False: as TRL does.")
    chat_template_kwargs: dict | str | None = setting(None, "Variables of the chat template, such as enable_thinking.")
    reasoning: Literal["strip", "keep"] = setting(
        "strip", "Whether rewards see a response without its reasoning, or with it."
    )
    reasoning_tags: list[str] | None = setting(None, "Opening and closing tag of reasoning; None: the template's.")
    value: Literal["adapter", "trunk"] = setting(
        "adapter", "Value model: an adapter of its own, or a head on the policy's trunk."
    )
    micro_batch_tokens: int | None = setting(None, "Maximum tokens per pass; None: 512 on a CPU, no limit on a GPU.")
    loss_reduction: Literal["minibatch", "micro_batch"] = setting(
        "minibatch", "Average losses over all tokens of an optimizer step, or per micro-batch as TRL does."
    )
    kl_weighting: Literal["additive", "weighted"] = setting(
        "additive", "score - beta KL, or (1 - beta) score - beta KL."
    )
    kl_target: float | None = setting(None, "Target KL for adapting kl_coef, in nats per response; None: fixed.")
    kl_horizon: int = setting(10_000, "Episodes over which the adaptation of kl_coef takes effect.")
    max_update_kl: float | None = setting(
        None, "Skip an update's remaining epochs above this approximate KL, in nats per token."
    )
    reward_weights: list[float] | None = setting(
        None, "Weights of the reward model, then of the functions; None: 1 each."
    )
    reward_normalization: Literal["none", "std", "batch"] = setting(
        "none", "Divide each reward by its running standard deviation, or standardize it per batch."
    )
    max_failed: float = setting(0.1, "Fraction of an update's responses that may have no reward.")
    reward_timeout: float | None = setting(3600.0, "Timeout of each reward function in seconds; None: no limit.")
    whiten_scores: bool = setting(False, "Scale each batch's scores to zero mean and unit variance.")
    score_clip: float | None = setting(None, "Clip scores to plus and minus this; None: no limit.")
    length_penalty: float = setting(0.0, "Penalty at full response length; proportionally less for shorter responses.")
    selection_prompts: int | None = setting(None, "Number of prompts whose responses the selectors see; None: all.")
    selection_every: int | None = setting(None, "Select again after this many updates; None: once.")
    rehearsal_coef: float = setting(0.01, "The rehearsal weight: of the rehearsed pairs' NLL in the loss.")
    rehearsal_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "Schedule of the weight.")
    rehearsal_batch_size: int | None = setting(
        None, "Rehearsed pairs per optimizer step; None: a quarter of a minibatch."
    )
    generation: Literal["transformers", "vllm"] = setting("transformers", "Backend that generates responses.")
    vllm_mode: Literal["colocate", "server"] = setting("colocate", "On the training GPUs, or on a separate server.")
    vllm_server_base_url: str | None = setting(None, "The server's address, instead of host and port.")
    vllm_server_host: str = setting("0.0.0.0", "The server's host.")
    vllm_server_port: int = setting(8000, "The server's port.")
    vllm_server_timeout: float = setting(240.0, "Seconds to wait until the server is up.")
    vllm_group_port: int = setting(51216, "Port for sending weights to the server.")
    vllm_gpu_memory_utilization: float = setting(0.3, "Fraction of GPU memory for the colocated engine, 0 to 1.")
    vllm_tensor_parallel_size: int = setting(1, "Number of GPUs per colocated engine.")
    vllm_max_model_length: int | None = setting(
        None, "Maximum tokens of prompt and response; None: the model's context."
    )
    vllm_enable_sleep_mode: bool = setting(False, "Free the colocated engine's memory during training.")
    vllm_sync: Literal["merged", "adapter"] = setting(
        "merged", "What the engine is given after an update: all weights, merged, or the adapter alone."
    )

    def __post_init__(self) -> None:
        settle_bf16(self)
        super().__post_init__()
        if isinstance(self.chat_template_kwargs, str):  # from a command line
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        problems = [
            Problem(f"{name} is {getattr(self, name)!r}.", fix=f"Choose one of: {', '.join(get_args(kind))}.")
            for name, kind in inspect.get_annotations(PPOConfig, eval_str=True).items()
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind)
        ]
        positive = ("micro_batch_tokens", "kl_target", "kl_horizon", "max_update_kl", "score_clip")
        positive += ("selection_prompts", "selection_every", "rehearsal_batch_size")
        positive += ("reward_timeout", "vllm_server_timeout", "vllm_tensor_parallel_size")
        problems += [
            Problem(f"{name} is {getattr(self, name)}; it must be above 0.")
            for name in positive
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if self.stop_tokens is not None and (self.stop_token or self.stop_token_id is not None):
            fix = "Leave out stop_token and stop_token_id."
            problems.append(Problem("stop_tokens replaces stop_token and stop_token_id.", fix=fix))
        if not 0 <= self.max_failed <= 1:
            problems.append(Problem(f"max_failed is {self.max_failed}; it must be a fraction from 0 to 1."))
        if not all(map(math.isfinite, self.reward_weights or [])):
            problems.append(Problem(f"reward_weights are {self.reward_weights}; they must be finite."))
        if self.rehearsal_coef < 0:
            problems.append(Problem(f"rehearsal_coef is {self.rehearsal_coef}; it must be 0 or above."))
        if self.kl_weighting == "weighted" and not 0 <= self.kl_coef <= 1:
            problems.append(
                Problem(f"kl_coef is {self.kl_coef}; with kl_weighting: weighted it must be a fraction from 0 to 1.")
            )
        if self.kl_weighting == "weighted" and self.kl_target is not None:
            problems.append(Problem("kl_target adapts the additive weight.", fix="Leave out kl_weighting: weighted."))
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            found = self.vllm_gpu_memory_utilization
            problems.append(Problem(f"vllm_gpu_memory_utilization is {found}; it must be above 0 and at most 1."))
        room, needed = self.vllm_max_model_length, (self.max_prompt_length or 1) + self.response_length
        if room is not None and room < needed:
            problems.append(
                Problem(
                    f"vllm_max_model_length is {room}; prompt and response need {needed} tokens.",
                    fix="Raise it, or lower max_prompt_length or response_length.",
                )
            )
        if self.vllm_sync == "adapter" and self.vllm_mode == "server":
            fix = "Set vllm_mode: colocate, or leave out vllm_sync."
            problems.append(Problem("A server is given merged weights, not the adapter.", fix=fix))
        if problems:
            raise UserError.from_problems(problems)


def with_defaults(args: BasePPOConfig) -> BasePPOConfig:
    """TRL 1.12's arguments, with the fields added here at their defaults.

    Raises:
        UserError: They ask for fp16.
    """
    if args.fp16:
        raise UserError("fp16 is not supported in PPO.", fix="Use bf16, or neither for float32.")
    for added in fields(PPOConfig):
        if not hasattr(args, added.name):
            setattr(args, added.name, added.default)
    return args
