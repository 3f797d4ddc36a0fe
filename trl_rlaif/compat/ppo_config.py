"""PPO's settings from TRL 1.12, for later releases of TRL, which no longer have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments


def setting(default: Any, help: str) -> Any:
    """A field of a configuration, with the text that a command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class OwnPPOConfig(TrainingArguments):
    """The fields of TRL 1.12's ``PPOConfig``, with their types and defaults.

    The trainer computes ``world_size``, ``num_total_batches`` and the batch sizes from ``micro_batch_size`` to
    ``mini_batch_size``. A batch is what one update samples and learns from: ``per_device_train_batch_size`` *
    ``gradient_accumulation_steps`` * processes.
    """

    # Training arguments whose default or type differs in TRL's trainers.
    learning_rate: float = setting(3e-6, "Initial learning rate.")
    logging_steps: float = setting(10, "Log after this many updates; below 1: a fraction of all updates.")
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass: less memory, slower.")
    bf16: bool | None = setting(None, "bfloat16 autocast; None: unless fp16 is set.")
    lr_scheduler_kwargs: dict | str | None = setting(None, "Additional arguments of the learning rate schedule.")
    use_liger_kernel: bool = setting(False, "Use Liger kernels for models that have them.")
    torch_empty_cache_steps: int | None = setting(None, "Empty the GPU's cache after this many steps; None: never.")

    dataset_num_proc: int | None = setting(None, "Number of processes that tokenize the prompts.")
    num_mini_batches: int = setting(1, "Number of minibatches per batch; each is one optimizer step.")
    total_episodes: int | None = setting(None, "Total number of responses to sample; None: num_train_epochs * prompts.")
    local_rollout_forward_batch_size: int = setting(64, "Rows per forward pass without gradients, per process.")
    num_sample_generations: int = setting(10, "How often sampled responses are shown during training; 0: never.")
    response_length: int = setting(53, "Maximum response length in tokens.")
    stop_token: Literal["eos"] | None = setting(None, "Stop token of responses: eos or none; or set stop_token_id.")
    stop_token_id: int | None = setting(None, "Id of the token that ends a response, instead of stop_token.")
    temperature: float = setting(0.7, "Sampling temperature.")
    missing_eos_penalty: float | None = setting(
        None, "Penalty on the score of a response without a stop token; above 0."
    )
    sft_model_path: str = setting("EleutherAI/pythia-160m", "Path of the policy; for scripts, unused here.")
    world_size: int | None = setting(None, "Number of processes; computed.")
    num_total_batches: int | None = setting(None, "Number of updates; computed.")
    micro_batch_size: int | None = setting(None, "Rows per backward pass over all processes; computed.")
    local_batch_size: int | None = setting(None, "Responses per update and process; computed.")
    batch_size: int | None = setting(None, "Responses per update over all processes; computed.")
    local_mini_batch_size: int | None = setting(None, "Responses per optimizer step and process; computed.")
    mini_batch_size: int | None = setting(None, "Responses per optimizer step over all processes; computed.")
    push_to_hub: bool = setting(False, "Push the policy to the Hub whenever it is saved.")
    reward_model_path: str = setting("EleutherAI/pythia-160m", "Path of the reward model; for scripts, unused here.")
    model_adapter_name: str | None = setting(None, "Name of the adapter to train, if the policy has several.")
    ref_adapter_name: str | None = setting(None, "Name of the reference adapter, if the policy has several.")
    num_ppo_epochs: int = setting(4, "Number of passes over each batch.")
    whiten_rewards: bool = setting(False, "Scale each batch's per-token rewards to unit variance.")
    kl_coef: float = setting(0.05, "beta, the weight of the KL to the reference.")
    kl_estimator: Literal["k1", "k3"] = setting("k1", "KL estimator (Schulman 2020): k1, or k3 with lower variance.")
    cliprange: float = setting(0.2, "Clip range of the policy ratio around 1 (Schulman et al. 2017, eq. 7).")
    vf_coef: float = setting(0.1, "Weight of the value loss.")
    cliprange_value: float = setting(0.2, "Clip range of the value around its value at sampling.")
    gamma: float = setting(1.0, "Discount factor per token.")
    lam: float = setting(0.95, "GAE lambda (Schulman et al. 2016).")
    ds3_gather_for_generation: bool = setting(True, "With ZeRO-3, gather the weights for generation.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()
