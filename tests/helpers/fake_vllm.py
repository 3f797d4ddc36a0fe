"""The part of vLLM 0.31.0 that this project uses, computed by transformers in float64, for machines without vLLM.

Only these parameters may be passed. They have vLLM's names and defaults; ``make test-servers`` compares them with an
installed vLLM.
"""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

VERSION = "0.31.0"


class SamplingParams:
    def __init__(
        self,
        *,
        n: int = 1,
        temperature: float = 1.0,
        seed: int | None = None,
        stop_token_ids: list[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        logprob_token_ids: list[int] | None = None,
        detokenize: bool = True,
    ) -> None:
        assert n == 1 or temperature > 0, "n must be 1 when using greedy sampling"
        assert logprob_token_ids is None or len(logprob_token_ids) <= 128
        vars(self).update({name: value for name, value in locals().items() if name != "self"})


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str = "") -> None:
        assert lora_int_id > 0 and lora_path
        self.lora_int_id, self.lora_path = lora_int_id, lora_path


class LLM:
    """``started`` holds the engines started, ``calls`` the requests of each call."""

    started: list[LLM] = []

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        enable_prefix_caching: bool | None = None,
        logprobs_mode: str = "raw_logprobs",
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
    ) -> None:
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        self.options = {name: value for name, value in locals().items() if name != "self"}
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        context = self.base.config.max_position_embeddings
        self.model_config = SimpleNamespace(max_model_len=max_model_len or context)
        self.adapted: PeftModel | None = None
        self.events: list[str] = []
        self.calls: list[list[tuple[list[int], SamplingParams]]] = []
        LLM.started.append(self)

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[Any]:
        asked = [(one["prompt_token_ids"], params) for one, params in zip(prompts, sampling_params, strict=True)]
        self.calls.append(asked)
        self.events.append("generate")
        if lora_request is None:
            return self._outputs(self.base, asked)
        self._read(str(lora_request.lora_int_id), lora_request.lora_path)
        return self._outputs(self.adapted, asked)

    def sleep(self, level: int = 1) -> None:
        self.events.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.events.append("wake")

    def _read(self, name: str, path: str) -> None:
        """Load an adapter once: later changes to its folder are not seen."""
        assert self.options["enable_lora"]
        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.base, path, adapter_name=name)
        elif name not in self.adapted.peft_config:
            self.adapted.load_adapter(path, name)
        else:
            return self.adapted.set_adapter(name)
        self.events.append("read")
        self.adapted.set_adapter(name)
        self.adapted.double().eval()
        assert self.options["max_lora_rank"] >= self.adapted.peft_config[name].r

    def _outputs(self, model: Any, asked: list[tuple[list[int], SamplingParams]]) -> list[Any]:
        return [SimpleNamespace(outputs=[self._drawn(model, *one, i) for i in range(one[1].n)]) for one in asked]

    @torch.no_grad()
    def _drawn(self, model: Any, prompt: list[int], params: SamplingParams, index: int) -> Any:
        assert len(prompt) + params.max_tokens <= self.model_config.max_model_len
        generator = torch.Generator().manual_seed((params.seed or 0) + index)
        drawn: list[int] = []
        named: list[dict[int, Any]] = []
        while len(drawn) < params.max_tokens and not (drawn and drawn[-1] in (params.stop_token_ids or ())):
            logprobs = model(torch.tensor([[*prompt, *drawn]])).logits[0, -1].log_softmax(-1)
            if params.temperature:
                shares = (logprobs / params.temperature).softmax(-1)
                drawn.append(int(torch.multinomial(shares, 1, generator=generator)))
            else:
                drawn.append(int(logprobs.argmax()))
            tokens = [drawn[-1], *(params.logprob_token_ids or ())]
            named.append({token: SimpleNamespace(logprob=float(logprobs[token])) for token in tokens})
        return SimpleNamespace(token_ids=drawn, logprobs=named if params.logprob_token_ids else None)


def parameters(function: Any) -> dict[str, Any]:
    """The default of each parameter, by name; None if it has none."""
    found = inspect.signature(function).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in found if p.name != "self"}


def install(monkeypatch: Any) -> type[LLM]:
    """Make ``import vllm`` find these classes."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    vars(modules["vllm"]).update(LLM=LLM, SamplingParams=SamplingParams, __version__=VERSION)
    vars(modules["vllm.lora.request"]).update(LoRARequest=LoRARequest)
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "started", [])
    return LLM
