"""Allowed ranges of numeric fields of TRL's configurations, which do not validate them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers from ``least`` to ``most``; an open end is excluded."""

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return above and below

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"above {self.least:g}" if self.open_least else f"{self.least:g} or more"
        words = f"{'above ' if self.open_least else ''}{self.least:g}"
        return f"{words} and below {self.most:g}" if self.open_most else f"{words} to {self.most:g}"


_COUNT, _NOT_NEGATIVE, _POSITIVE = Range(1), Range(0), Range(0, open_least=True)
_SHARE, _BELOW_ONE, _PART = Range(0, 1), Range(0, 1, open_most=True), Range(0, 1, open_least=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_mini_batches",
         "num_ppo_epochs", "total_episodes", "response_length", "max_prompt_length", "max_length",
         "max_completion_length", "local_rollout_forward_batch_size", "micro_batch_tokens", "kl_horizon",
         "num_iterations",
         "selection_prompts", "selection_every", "rehearsal_batch_size", "dataset_num_proc",
         "generation_batch_size", "steps_per_generation", "vllm_tensor_parallel_size", "vllm_max_model_length",
         "eval_accumulation_steps", "torch_empty_cache_steps", "pad_to_multiple_of"), _COUNT,
    ),
    "num_generations": Range(2),
    **dict.fromkeys(
        ("learning_rate", "kl_coef", "beta", "vf_coef", "rehearsal_coef", "length_penalty", "weight_decay",
         "max_grad_norm",
         "num_sample_generations", "dataloader_num_workers", "warmup_steps", "eval_delay", "logging_steps",
         "stop_token_id", "center_rewards_coefficient", "neftune_noise_alpha"), _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        ("temperature", "cliprange", "cliprange_value", "epsilon", "epsilon_high", "delta", "kl_target",
         "max_update_kl",
         "score_clip", "missing_eos_penalty", "reward_timeout", "num_train_epochs", "save_steps", "eval_steps",
         "adam_epsilon", "repetition_penalty", "vllm_server_timeout"), _POSITIVE,
    ),
    **dict.fromkeys(("gamma", "lam", "max_failed", "min_p"), _SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "label_smoothing"), _BELOW_ONE),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), _PART),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), Range(1, 65535)),
}  # fmt: skip


# Fields for which infinity means no limit: REINFORCE's preset does not clip the ratio.
_NO_LIMIT = {"cliprange", "cliprange_value", "max_grad_norm", "score_clip", "delta", "max_update_kl"}


def out_of_range(key: str, value: Any) -> str | None:
    """The requirement that a field's number violates, in words; None if it is valid or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isnan(value) or (math.isinf(value) and not (key in _NO_LIMIT and value > 0)):
        return "a finite number"
    allowed = RANGES.get(key)
    return None if allowed is None or value in allowed else str(allowed)
