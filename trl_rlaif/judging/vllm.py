"""A judge whose model runs on this machine in vLLM's engine, without a server."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_rlaif.errors import UserError
from trl_rlaif.generation import derived_seed
from trl_rlaif.judging.candidates import Candidates
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.tokens import TokenJudge
from trl_rlaif.models.loading import ModelSpec, resolve

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from vllm import LLM

    from trl_rlaif.batching import Tokens

# Tokens given to the engine at once: it schedules them itself, and labels are saved when all are answered.
BATCH_TOKENS = 1 << 18


@dataclass(frozen=True)
class Engine:
    """A model in vLLM.

    Args:
        llm: The engine.
        generation_config: The checkpoint's, for its stop tokens; None if it has none.
        adapter: Folder of a LoRA adapter for all requests.
    """

    llm: LLM
    generation_config: GenerationConfig | None = None
    adapter: Path | None = None

    @classmethod
    def start(cls, spec: ModelSpec, adapter: Path | None = None, **options: Any) -> Engine:
        """Load a model into a new engine.

        Args:
            spec: Path and dtype of the weights. The folder of a LoRA adapter loads its base with the adapter.
            adapter: As of the class.
            options: Further arguments of ``vllm.LLM``.

        Raises:
            UserError: vLLM is not installed or too old, or there would be two adapters.
        """
        from peft import LoraConfig
        from peft.utils import CONFIG_NAME
        from transformers import GenerationConfig

        try:
            from vllm import LLM, SamplingParams
        except ImportError:
            what = "A judge with backend: vllm needs the package vllm."
            raise UserError(what, fix="pip install 'trl-rlaif[vllm]'") from None
        if "logprob_token_ids" not in inspect.signature(SamplingParams).parameters:
            what = "This release of vLLM cannot return log-probabilities of given tokens (logprob_token_ids)."
            raise UserError(what, fix="pip install --upgrade 'trl-rlaif[vllm]'")
        path, config = resolve(spec.path), None
        if (Path(path) / CONFIG_NAME).exists():
            if adapter is not None:
                what = "vLLM loads one adapter, so a judge that is an adapter cannot be taught another."
                raise UserError(what, where=spec.path, fix="Name its base, or export it with --merge.")
            adapter = Path(path)
            path = LoraConfig.from_pretrained(path).base_model_name_or_path
        with suppress(OSError):
            config = GenerationConfig.from_pretrained(path)
        if adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": max_lora_rank(LoraConfig.from_pretrained(str(adapter)))}
        # Log-probabilities of the model itself, whatever is sampled.
        fixed = {"enable_prefix_caching": True, "logprobs_mode": "raw_logprobs"}
        return cls(LLM(model=path, dtype=spec.dtype, **fixed, **options), config, adapter)

    @property
    def max_length(self) -> int:
        """Maximum tokens of a request, including the answer."""
        return self.llm.model_config.max_model_len

    def generate(self, prompts: Sequence[Tokens], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One RequestOutput for each prompt, in order.

        Args:
            params: Arguments of ``vllm.SamplingParams`` for each prompt.
        """
        from vllm import SamplingParams

        return self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [SamplingParams(detokenize=False, **one) for one in params],
            use_tqdm=False,
            lora_request=self._lora,
        )

    @cached_property
    def _lora(self) -> Any:
        from vllm.lora.request import LoRARequest

        return None if self.adapter is None else LoRARequest("judge", 1, str(self.adapter))


class EngineScorer:
    """Log-probabilities of the same continuations after contexts.

    Each proper prefix of a continuation, such as "" and "1" of "10", is a request for one token. vLLM returns the
    log-probabilities of its possible next tokens (``logprob_token_ids``) under the softmax over the whole vocabulary.
    Shared prefixes are computed once. ``prompt_logprobs`` would give the same numbers, but bypass vLLM's prefix cache.

    Args:
        engine: The model.
        continuations: K token lists, each at least one token.
    """

    def __init__(self, engine: Engine, continuations: Sequence[Tokens]) -> None:
        self.engine, self.continuations = engine, continuations
        self._next: dict[tuple[int, ...], dict[int, None]] = {}
        for continuation in continuations:
            for place, token in enumerate(continuation):
                self._next.setdefault(tuple(continuation[:place]), {})[token] = None

    def batches(self, groups: Sequence[Sequence[Tokens]], budget: int) -> list[list[int]]:
        """Indices of groups in order, in batches of one size that keeps any of them within the token budget."""
        size = max(1, budget // max(sum(map(len, group)) for group in groups))
        return [list(range(start, min(start + size, len(groups)))) for start in range(0, len(groups), size)]

    def __call__(self, groups: Sequence[Sequence[Tokens]]) -> torch.Tensor:
        """log P(continuation | context): (contexts, K) float64, nats, group by group."""
        contexts = [context for group in groups for context in group]
        asked = {"max_tokens": 1, "temperature": 0.0}
        found = iter(
            self.engine.generate(
                [[*context, *beginning] for context in contexts for beginning in self._next],
                [asked | {"logprob_token_ids": list(tokens)} for _ in contexts for tokens in self._next.values()],
            )
        )
        return torch.tensor([self._row(list(islice(found, len(self._next)))) for _ in contexts], dtype=torch.float64)

    def _row(self, outputs: Sequence[Any]) -> list[float]:
        steps = {
            beginning: {token: output.outputs[0].logprobs[0][token].logprob for token in tokens}
            for (beginning, tokens), output in zip(self._next.items(), outputs, strict=True)
        }
        return [sum(steps[tuple(c[:place])][token] for place, token in enumerate(c)) for c in self.continuations]


class VLLMJudge(TokenJudge):
    """A causal language model in vLLM.

    The engine decides which requests share a forward pass, which may change the last digits.

    Args:
        model: The engine.
        tokenizer, prompt, name, chat_template_kwargs: As in TokenJudge.
    """

    model: Engine

    def __init__(
        self,
        model: Engine,
        tokenizer: PreTrainedTokenizerBase,
        prompt: JudgePrompt,
        name: str,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        how = {"batch_tokens": BATCH_TOKENS, "chat_template_kwargs": chat_template_kwargs}
        super().__init__(model, tokenizer, prompt, name, **how)

    @property
    def max_length(self) -> int:
        """Context length of the model in tokens, including the answer."""
        return self.model.max_length

    def _scorer(self, known: Candidates, contexts: Sequence[Sequence[list[int]]], longest: int) -> EngineScorer:
        return EngineScorer(self.model, known.continuations)

    def _sample(
        self,
        contexts: Sequence[list[int]],
        *,
        seed: tuple[object, ...],
        num_responses: int = 1,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        keep_end: bool = False,
    ) -> list[list[list[int]]]:
        """As in TokenJudge. Each context has its own seed."""
        shared: dict[str, Any] = {"n": num_responses, "max_tokens": max_new_tokens, "temperature": temperature}
        shared |= {"stop_token_ids": list(stop_ids), "ignore_eos": True}  # no other token ends a text
        params = [shared | {"seed": derived_seed(*seed, *context)} for context in contexts]
        outputs = self.model.generate(contexts, params)
        return [[_response(one.token_ids, stop_ids, keep_end) for one in output.outputs] for output in outputs]


def _response(ids: Sequence[int], stop_ids: Sequence[int], keep_end: bool) -> list[int]:
    ended = bool(ids) and ids[-1] in stop_ids
    return list(ids[:-1] if ended and not keep_end else ids)


def max_lora_rank(config: LoraConfig) -> int:
    """The smallest ``max_lora_rank`` that vLLM accepts for an adapter."""
    largest = max(config.r, *config.rank_pattern.values(), 8)
    return 1 << (largest - 1).bit_length()
