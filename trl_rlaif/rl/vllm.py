"""Sampling with vLLM through TRL's integration, from merged copies of the policy's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from trl.import_utils import is_vllm_available

from trl_rlaif.batching import pad_rows
from trl_rlaif.compat.vllm_engine import engine_for, server_errors
from trl_rlaif.errors import UserError
from trl_rlaif.models.role_models import RoleModels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl.generation.vllm_generation import VLLMGeneration

    from trl_rlaif.rl.ppo.config import PPOConfig

_LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this, except 0
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class VLLMSampler:
    """Samples responses with vLLM. The engine starts at the first call.

    Args:
        args: Response length, and where vLLM runs.
        accelerator: With several processes, each passes equally many prompts of its own; TRL gathers them.
        tokenizer: Padding.
        stop_ids: The tokens that end a response; without any, it is sampled to the full length.
    """

    def __init__(
        self, args: PPOConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
    ) -> None:
        self.args, self.accelerator, self.tokenizer, self.stop_ids = args, accelerator, tokenizer, stop_ids
        self._engine: Any = None
        self._given: list[int] | None = None  # trained_bits of what the engine has

    def generate(
        self, role_models: RoleModels, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Sample one response per prompt from the policy's full distribution.

        Args:
            prompt_ids: (B, P) int64, padded on the left.
            prompt_mask: (B, P) bool.
            temperature: >= 0; below 0.01, decoding is greedy.

        Returns:
            (B, T) int64, padded after the ends; T is at most the response length.

        Raises:
            UserError: The engine cannot be given the policy: see ``MergedPolicy`` and ``AdapterSampler``.
            RunError: The server does not answer.
        """
        rows = zip(prompt_ids.tolist(), prompt_mask.tolist(), strict=True)
        prompts = [list(compress(ids, mask)) for ids, mask in rows]
        responses = self._sample(role_models, prompts, temperature if temperature >= _LOWEST_TEMPERATURE else 0.0)
        return pad_rows(responses, self.tokenizer.pad_token_id)[0].to(prompt_ids.device)

    def _sample(self, role_models: RoleModels, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        """Responses of the current policy, without padding."""
        model = role_models.model("policy")
        # In the policy's role throughout: an engine that wakes from sleep requests the weights again by itself.
        with role_models.role("policy"), server_errors():
            if self._engine is None:
                with engine_for(model.dtype):
                    self._engine = self._start(model)
            self._hand_over(model)
            self._engine.temperature = temperature
            _, responses, *_ = self._engine.generate(prompts=prompts, images=None, num_generations=1)
        return responses

    def _start(self, model: nn.Module) -> VLLMGeneration:
        from trl.generation.vllm_generation import VLLMGeneration

        args = self.args
        return VLLMGeneration(
            MergedPolicy(model),
            self.accelerator,
            self.tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.local_batch_size * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            # The full distribution: PPO uses its log-probabilities.
            repetition_penalty=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            max_completion_length=args.response_length,
            logprobs=None,
            # vLLM would also stop at every end token of the checkpoint's generation config.
            generation_kwargs={"ignore_eos": True, "stop_token_ids": list(self.stop_ids)},
        )

    def _hand_over(self, model: nn.Module) -> None:
        """Send the engine the policy's current weights, unless it has them."""
        present = trained_bits(model)
        if present != self._given:
            self._engine.sync_weights()
            self._given = present


def check_installed() -> None:
    """Raise a UserError unless vLLM is installed."""
    if not is_vllm_available():
        raise UserError(
            "generation: vllm needs the package vllm.",
            fix="Run: pip install 'trl-rlaif[vllm]', or leave out generation: vllm.",
        )


def trained_bits(model: nn.Module) -> list[int]:
    """A checksum of each trained tensor's bits: version counters miss writes through .data, as by checkpoints."""
    trained = [p.detach().contiguous() for p in model.parameters() if p.requires_grad]
    return torch.stack([p.view(_BITS[p.element_size()]).sum() for p in trained]).tolist() if trained else []


class MergedPolicy(nn.Module):
    """A policy as a plain model: named parameters of the base, with the active adapter merged in on reading.

    TRL would merge every active adapter into the model in place, and unmerge it again. That leaves rounding errors in
    the shared base, and requantizes an NF4 base each time. Here each layer's merged weight is a copy, computed when it
    is read, in the layer's precision, and dequantized; the model itself is only read. vLLM therefore holds the base
    unquantized.

    Args:
        model: A transformers model, with or without LoRA layers.

    Raises:
        UserError: The adapter is not plain LoRA on linear layers and embeddings with weights of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_mergeable(model)
        self.name_or_path = model.name_or_path
        self._policy = lambda: model  # not a submodule: TRL would look for layers in it

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Name in the checkpoint and (merged) weight, one at a time."""
        model = self._policy()
        adapted = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        layers = {id(layer.get_base_layer().weight): layer for layer in adapted}
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                yield name.replace(".base_layer", ""), _merged(parameter, layers.get(id(parameter)))


@torch.no_grad()
def _merged(parameter: nn.Parameter, layer: BaseTunerLayer | None) -> torch.Tensor:
    weight = dequantize_bnb_weight(parameter) if type(parameter).__name__ == "Params4bit" else parameter.data
    if layer is None:
        return weight
    # In float32 if the adapter is, and rounded once.
    return sum((layer.get_delta_weight(name) for name in _active(layer)), weight).to(weight.dtype)


def _active(layer: BaseTunerLayer) -> list[str]:
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.r]


def check_mergeable(model: nn.Module) -> None:
    """Raise a UserError unless the adapter is plain LoRA on layers that have weights of their own."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or (
            isinstance(module, BaseTunerLayer) and not _is_plain(module)
        ):
            raise UserError(
                f"generation: vllm merges plain LoRA on linear layers and embeddings, and {name} is more than that.",
                fix="Leave out DoRA, biases, modules_to_save and the like, or generation: vllm.",
            )
        if isinstance(module, BaseTunerLayer) and uses[id(module.get_base_layer().weight)] > 1:
            raise UserError(
                f"{name} has an adapter, and shares its weights with another layer; merged, the two would differ.",
                fix="Leave it out of target_modules, or leave out generation: vllm.",
            )


def _is_plain(layer: BaseTunerLayer) -> bool:
    return isinstance(layer, lora.Linear | lora.Embedding | lora.Linear4bit) and not any(
        name in layer.lora_variant or layer.lora_bias.get(name) for name in _active(layer)
    )
