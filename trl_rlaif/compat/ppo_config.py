"""The settings of PPO that TRL had until 1.12, for a TRL that has them no longer."""

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

    What the trainer works out is written into ``world_size``, ``num_total_batches`` and the batch sizes from
    ``micro_batch_size`` to ``mini_batch_size``: a batch is what one update samples and learns from,
    ``per_device_train_batch_size`` * ``gradient_accumulation_steps`` * processes.
    """

    # Of the training arguments, those whose default or type is another one in TRL's trainers.
    learning_rate: float = setting(3e-6, "Learning rate at the start of its schedule.")
    logging_steps: float = setting(10, "Updates between two logs; below 1 a share of all updates.")
    gradient_checkpointing: bool = setting(True, "Compute activations anew in the backward pass: less memory, slower.")
    bf16: bool | None = setting(None, "bfloat16 autocast; unless it is set, wherever fp16 is not.")
    lr_scheduler_kwargs: dict | str | None = setting(None, "Further arguments of the learning rate's schedule.")
    use_liger_kernel: bool = setting(False, "Liger's kernels, for models that have them.")
    torch_empty_cache_steps: int | None = setting(None, "Steps between two emptyings of the GPU's cache; None: never.")

    dataset_num_proc: int | None = setting(None, "Processes that tokenize the prompts.")
    num_mini_batches: int = setting(1, "Parts of a batch, each of which is an optimizer step.")
    total_episodes: int | None = setting(None, "Responses to sample in all; None: num_train_epochs * prompts.")
    local_rollout_forward_batch_size: int = setting(64, "Rows of one forward pass without gradients, per process.")
    num_sample_generations: int = setting(10, "How often sampled responses are shown in a run; 0: never.")
    response_length: int = setting(53, "Most tokens of a response.")
    stop_token: Literal["eos"] | None = setting(None, "What ends a response: eos, or nothing; or give stop_token_id.")
    stop_token_id: int | None = setting(None, "The token that ends a response, in place of stop_token.")
    temperature: float = setting(0.7, "Sampling temperature.")
    missing_eos_penalty: float | None = setting(None, "Taken from the score of a response that has no end; above 0.")
    sft_model_path: str = setting("EleutherAI/pythia-160m", "Path of the policy; for scripts, not read here.")
    world_size: int | None = setting(None, "Processes; worked out.")
    num_total_batches: int | None = setting(None, "Updates of the run; worked out.")
    micro_batch_size: int | None = setting(None, "Rows of one backward pass, over all processes; worked out.")
    local_batch_size: int | None = setting(None, "Responses of one update, per process; worked out.")
    batch_size: int | None = setting(None, "Responses of one update, over all processes; worked out.")
    local_mini_batch_size: int | None = setting(None, "Responses of one optimizer step, per process; worked out.")
    mini_batch_size: int | None = setting(None, "Responses of one optimizer step, over all processes; worked out.")
    push_to_hub: bool = setting(False, "Push the policy to the Hub when it is saved.")
    reward_model_path: str = setting("EleutherAI/pythia-160m", "Path of the reward model; for scripts, not read here.")
    model_adapter_name: str | None = setting(None, "The adapter that is trained, of a policy that has several.")
    ref_adapter_name: str | None = setting(None, "The adapter that is the reference, of a policy that has several.")
    num_ppo_epochs: int = setting(4, "Passes over each batch.")
    whiten_rewards: bool = setting(False, "Scale each batch's rewards per token to unit variance.")
    kl_coef: float = setting(0.05, "beta, the weight of the KL to the reference.")
    kl_estimator: Literal["k1", "k3"] = setting("k1", "The KL's estimate (Schulman 2020): k1, or k3 of lower variance.")
    cliprange: float = setting(0.2, "Furthest the policy's ratio counts from 1 (Schulman et al. 2017, eq. 7).")
    vf_coef: float = setting(0.1, "Weight of the value's loss.")
    cliprange_value: float = setting(0.2, "Furthest the value may move from what it was at sampling.")
    gamma: float = setting(1.0, "Discount of later rewards, per token.")
    lam: float = setting(0.95, "lambda of the advantages (GAE, Schulman et al. 2016).")
    ds3_gather_for_generation: bool = setting(True, "Gather the weights to sample, with ZeRO-3.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()
