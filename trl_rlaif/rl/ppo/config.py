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
    """The PPOConfig of TRL 1.12 with additional fields.

    The defaults are TRL's behavior except for three: ``score_at_end=False`` and ``loss_reduction="micro_batch"`` give
    the numbers of TRL's trainer, and ``bf16`` is on only where the machine computes bfloat16 fast.

    Args:
        bf16: bfloat16 autocast; None: where the machine computes it fast.
        max_prompt_length: Longest prompt in tokens; a longer one is left out, counted and reported.
            None takes what the model's context leaves beside ``response_length``.
        stop_tokens: Tokens that end a response in place of ``stop_token``. With ``stop_token: eos``
            the model's own end one: the end of turn of its chat template, its eos, and those of its generation config.
        score_at_end: The reward model reads every response at the end of its turn, as it was trained on whole
            responses; one that was cut at ``response_length`` gets that token appended. False: as sampled, as in TRL.
        chat_template_kwargs: Variables for the chat template of conversational prompts, such as ``enable_thinking``; a
            column of that name has a row's own, as in TRL.
        reasoning: ``strip`` takes a response's reasoning out of what reward model, functions, judges and selectors
            see, ``keep`` leaves it there. A response whose reasoning never ended counts as cut.
        reasoning_tags: What reasoning begins and ends with; None: as the chat template says.
        value: Where the value lives on a shared base: ``adapter``, one of its own, or ``trunk``, a head on the
            policy's hidden states (no second forward and backward pass, but the two share their features).
        micro_batch_tokens: Most tokens, padding counted, that one forward and backward pass holds. A larger
            micro-batch is computed in parts whose gradients add up to the same. None: 512 on a CPU, which larger ones
            do not make faster, and no limit on a GPU.
        loss_reduction: ``minibatch`` averages the losses over all tokens of an optimizer step, in every micro-batch and
            process: halving per_device_train_batch_size and doubling gradient_accumulation_steps changes no gradient.
            ``micro_batch`` averages over each micro-batch and then over these, as TRL's trainer does.
        kl_weighting: ``additive`` is score - beta * KL (Peng et al. 2023), ``weighted`` is (1 - beta) * score -
            beta * KL (Lee et al. 2023).
        kl_target: KL to the reference, in nats a response, that ``kl_coef`` is steered to (Ziegler et al. 2019,
            sec. 2.2); None leaves it fixed.
        kl_horizon: Episodes in which the steering takes effect.
        max_update_kl: An update's remaining epochs are left out once the approximate KL between the policy and
            the one that sampled exceeds this on the last minibatch of an epoch, in nats per response token.
        reward_weights: Of the reward model, if there is one, then of ``reward_funcs`` in their order; None: 1 each.
        reward_normalization: Of each reward before the weighted sum: ``none``; ``std``, divided by the standard
            deviation of all of its values so far; ``batch``, to mean 0 and standard deviation 1 in each batch (see
            ``RewardSum``).
        max_failed: Share of an update's responses, 0 to 1, that may have no reward, and that a judge may fail to rate;
            beyond it the run saves a checkpoint and stops. Of smaller updates the last 100 responses are counted.
            Responses without a reward are left out of the losses, of whitening and of what transforms see.
        reward_timeout: Seconds that each reward function may take for one batch, from its own start; asynchronous ones
            run together, and are looked at once the others have returned. One that takes longer ends the run with its
            name (and those of the others that wait, if it blocks the event loop that they share): an hour is more than
            a working call needs, and a night is too long to wait. None: no limit.
        whiten_scores: Scale each batch's scores to zero mean and unit variance.
        score_clip: Scores are kept within plus and minus this, after whitening; > 0.
        length_penalty: Taken from the score for a response of full length, in proportion for a shorter one.
        selection_prompts: Prompts, drawn at random, to which the data selectors see responses; None: all.
        selection_every: Updates after which the selectors choose anew, from the policy's responses then; None: once.
        rehearsal_coef: gamma, the weight of the rehearsed pairs' NLL beside PPO's losses (Peng et al. 2023).
        rehearsal_schedule: ``constant``; or gamma falls to zero over the run, ``linear`` or as half a ``cosine``.
        rehearsal_batch_size: Pairs an optimizer step in each process; None: a quarter of a minibatch, an eighth with
            ``value: trunk``.
        generation: What draws the responses: ``transformers``, or ``vllm`` through TRL's integration. The old
            log-probabilities are the policy's own either way.
        vllm_*: As in TRL's GRPOConfig; those of the server, or of the colocated engine, as ``vllm_mode`` says.
            Prompts that leave no room for the response in ``vllm_max_model_length`` are left out.
    """

    bf16: bool | None = setting(None, "bfloat16 autocast; None: where the machine computes it fast.")
    max_prompt_length: int | None = setting(
        None, "Longest prompt in tokens; longer ones are left out, counted and reported."
    )
    stop_tokens: list[str] | None = setting(None, "Tokens that end a response, in place of the model's own.")
    score_at_end: bool = setting(True, "Append the end of turn to cut responses for the reward model; False: as TRL.")
    chat_template_kwargs: dict | str | None = setting(None, "Variables for the chat template, such as enable_thinking.")
    reasoning: Literal["strip", "keep"] = setting("strip", "What rewards see of a response's reasoning.")
    reasoning_tags: list[str] | None = setting(None, "What reasoning begins and ends with; None: by the template.")
    value: Literal["adapter", "trunk"] = setting("adapter", "The value: an adapter, or a head on the policy's trunk.")
    micro_batch_tokens: int | None = setting(None, "Most tokens of one pass; None: 512 on a CPU, no limit on a GPU.")
    loss_reduction: Literal["minibatch", "micro_batch"] = setting(
        "minibatch", "Losses are means over all tokens of an optimizer step, or over each micro-batch's (as TRL)."
    )
    kl_weighting: Literal["additive", "weighted"] = setting(
        "additive", "score - beta KL, or (1 - beta) score - beta KL."
    )
    kl_target: float | None = setting(None, "KL in nats a response that kl_coef is steered to; None: fixed.")
    kl_horizon: int = setting(10_000, "Episodes in which the steering of kl_coef takes effect.")
    max_update_kl: float | None = setting(None, "Stop an update's epochs beyond this approximate KL, nats per token.")
    reward_weights: list[float] | None = setting(None, "Of the reward model, then of the functions; None: 1 each.")
    reward_normalization: Literal["none", "std", "batch"] = setting(
        "none", "Divide each reward by its running standard deviation, or standardize it in each batch."
    )
    max_failed: float = setting(0.1, "Share of an update's responses that may have no reward.")
    reward_timeout: float | None = setting(3600.0, "Seconds that each reward function may take; None: no limit.")
    whiten_scores: bool = setting(False, "Scale each batch's scores to zero mean and unit variance.")
    score_clip: float | None = setting(None, "Keep scores within plus and minus this; None: no limit.")
    length_penalty: float = setting(0.0, "Taken from the score of a response of full length, else in proportion.")
    selection_prompts: int | None = setting(None, "Prompts to which selectors see responses; None: all.")
    selection_every: int | None = setting(None, "Updates after which the selectors choose anew; None: once.")
    rehearsal_coef: float = setting(0.01, "gamma, the weight of the rehearsed pairs' NLL.")
    rehearsal_schedule: Literal["constant", "linear", "cosine"] = setting("constant", "gamma over the run.")
    rehearsal_batch_size: int | None = setting(None, "Pairs an optimizer step; None: a quarter of a minibatch.")
    generation: Literal["transformers", "vllm"] = setting("transformers", "What draws the responses.")
    vllm_mode: Literal["colocate", "server"] = setting("colocate", "On the training GPUs, or a server of its own.")
    vllm_server_base_url: str | None = setting(None, "The server's address, in place of host and port.")
    vllm_server_host: str = setting("0.0.0.0", "The server's host.")
    vllm_server_port: int = setting(8000, "The server's port.")
    vllm_server_timeout: float = setting(240.0, "Seconds to wait until the server is up.")
    vllm_group_port: int = setting(51216, "Port over which the server is sent the weights.")
    vllm_gpu_memory_utilization: float = setting(0.3, "Share of a GPU's memory for the colocated engine, 0 to 1.")
    vllm_tensor_parallel_size: int = setting(1, "GPUs that one colocated engine is spread over.")
    vllm_max_model_length: int | None = setting(None, "Most tokens of prompt and response; None: the model's context.")
    vllm_enable_sleep_mode: bool = setting(False, "Free the colocated engine's memory while the policy is trained.")

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
            problems.append(Problem("stop_tokens takes the place of stop_token and stop_token_id.", fix=fix))
        if not 0 <= self.max_failed <= 1:
            problems.append(Problem(f"max_failed is {self.max_failed}; it is a share, 0 to 1."))
        if not all(map(math.isfinite, self.reward_weights or [])):
            problems.append(Problem(f"reward_weights are {self.reward_weights}; they must be finite."))
        if self.rehearsal_coef < 0:
            problems.append(Problem(f"rehearsal_coef is {self.rehearsal_coef}; it must be 0 or above."))
        if self.kl_weighting == "weighted" and not 0 <= self.kl_coef <= 1:
            problems.append(Problem(f"kl_coef is {self.kl_coef}; with kl_weighting: weighted it is a share, 0 to 1."))
        if self.kl_weighting == "weighted" and self.kl_target is not None:
            problems.append(Problem("kl_target steers the additive weight.", fix="Leave out kl_weighting: weighted."))
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            found = self.vllm_gpu_memory_utilization
            problems.append(Problem(f"vllm_gpu_memory_utilization is {found}; it is a share, above 0 and up to 1."))
        room, needed = self.vllm_max_model_length, (self.max_prompt_length or 1) + self.response_length
        if room is not None and room < needed:
            problems.append(
                Problem(
                    f"vllm_max_model_length is {room}; prompt and response need {needed} tokens.",
                    fix="Raise it, or lower max_prompt_length or response_length.",
                )
            )
        if problems:
            raise UserError.from_problems(problems)


def with_defaults(args: BasePPOConfig) -> BasePPOConfig:
    """The arguments of TRL 1.12 with the defaults of what is added here.

    Raises:
        UserError: They ask for fp16.
    """
    if args.fp16:
        raise UserError("fp16 is not supported in PPO.", fix="Use bf16, or neither for float32.")
    for added in fields(PPOConfig):
        if not hasattr(args, added.name):
            setattr(args, added.name, added.default)
    return args
