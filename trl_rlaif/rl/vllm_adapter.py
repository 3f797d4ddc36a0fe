"""Sampling with a vLLM engine that keeps the base and receives only the policy's adapter."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners import lora

from trl_rlaif.compat.vllm_engine import engine_options
from trl_rlaif.errors import UserError
from trl_rlaif.generation import random_state, set_random_state
from trl_rlaif.judging.vllm import max_lora_rank
from trl_rlaif.models.role_models import RoleModels
from trl_rlaif.models.shared_model import inner_model, save_adapter
from trl_rlaif.rl.vllm import VLLMSampler, check_mergeable, trained_bits

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from trl_rlaif.rl.ppo.config import PPOConfig


class AdapterSampler(VLLMSampler):
    """Samples responses with vLLM in this process, which applies the policy's adapter to its own copy of the base.

    After an update the adapter, some megabytes, is written to a folder and read by the engine as a LoRA request. The
    base is read once, from where the policy's was loaded, and is restored from host memory after the engine has slept.
    TRL's integration, which ``VLLMSampler`` uses, sends all weights, merged, and drops them when the engine sleeps.
    Seeds come from torch's generator.

    Args:
        args, accelerator, tokenizer, stop_ids: As for ``VLLMSampler``.

    Raises:
        UserError: There are several processes.
    """

    def __init__(self, args: PPOConfig, accelerator: Accelerator, *rest: Any) -> None:
        if accelerator.num_processes > 1:
            raise UserError("vllm_sync: adapter runs in one process.", fix="Leave it out: merged weights are sent.")
        super().__init__(args, accelerator, *rest)
        self._request: LoRARequest | None = None
        self._folder: TemporaryDirectory[str] | None = None

    def _sample(self, role_models: RoleModels, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        peft, name = role_models.adapter()
        if self._engine is None:
            _check(peft, name)
            self._engine = self._start_with(peft, name)
        elif self.args.vllm_enable_sleep_mode:
            self._engine.wake_up()
        self._hand_over_adapter(peft, name)
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [self._params(seed, temperature) for seed in torch.randint(1 << 31, (len(prompts),)).tolist()],
            use_tqdm=False,
            lora_request=self._request,
        )
        if self.args.vllm_enable_sleep_mode:
            self._engine.sleep(level=1)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _start_with(self, peft: PeftModel, name: str) -> LLM:
        from vllm import LLM

        args, model, before = self.args, inner_model(peft), random_state()
        llm = LLM(
            model=model.name_or_path,
            enable_lora=True,
            max_lora_rank=max_lora_rank(peft.peft_config[name]),
            max_num_seqs=args.local_batch_size,
            max_model_len=args.vllm_max_model_length,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            **engine_options(model.dtype),
        )
        set_random_state(before)  # the engine seeds this process, and a resumed run starts one too
        return llm

    def _hand_over_adapter(self, peft: PeftModel, name: str) -> None:
        """Have the engine read the current adapter, unless it has it."""
        from vllm.lora.request import LoRARequest

        present = trained_bits(peft)
        if self._request is None or present != self._given:
            folder = TemporaryDirectory(prefix="policy-")
            save_adapter(peft, name, folder.name)
            version = self._request.lora_int_id + 1 if self._request else 1
            # A new name and number: the engine caches by them, including prefixes of the old policy.
            self._request = LoRARequest(f"policy-{version}", version, folder.name)
            self._folder, self._given = folder, present  # the engine may read the folder again

    def _params(self, seed: int, temperature: float) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=self.args.response_length,
            stop_token_ids=list(self.stop_ids),
            ignore_eos=True,  # no other token ends a response
            detokenize=False,
        )


def _check(peft: PeftModel, name: str) -> None:
    config, model = peft.peft_config[name], inner_model(peft)
    check_mergeable(model)
    if any(isinstance(module, lora.Embedding) for module in model.modules()):
        raise UserError(
            "vLLM applies adapters to linear layers alone, and this one has an embedding.",
            fix="Leave it out of target_modules, or leave out vllm_sync: adapter.",
        )
    if config.rank_pattern or config.alpha_pattern:
        raise UserError(
            "vLLM scales all layers of an adapter alike, and this one has a rank_pattern or alpha_pattern.",
            fix="Leave them out, or leave out vllm_sync: adapter.",
        )
    if any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
        raise UserError(
            "The engine's base would not be the policy's, which is in 4 bits.", fix="Leave out vllm_sync: adapter."
        )
