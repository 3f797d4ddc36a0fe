"""Adapts TRL's vLLM engine to CPUs, and reports errors of its server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trl_rlaif.errors import RunError, UserError


@contextmanager
def engine_for(dtype: torch.dtype) -> Iterator[None]:
    """A context in which TRL builds its engine, for a policy with weights of this dtype.

    On a CPU, TRL (1.16) leaves the dtype to vLLM, which uses bfloat16 for float32 weights, and lets it compile; here,
    the engine has the policy's dtype and compiles nothing.

    Raises:
        UserError: TRL cannot send the weights to a server from here.
        RunError: The server does not answer.
    """
    from trl.generation import vllm_generation  # imports vLLM, where it is installed

    real = getattr(vllm_generation, "LLM", None)
    try:
        if real is not None and _on_cpu():
            vllm_generation.LLM = lambda **given: _reloading(real(**given | engine_options(dtype)))
        with server_errors():
            yield
    except NotImplementedError as error:
        raise UserError(f"generation: vllm: {error}", fix="Set vllm_mode: colocate.") from None
    finally:
        if real is not None:
            vllm_generation.LLM = real


def engine_options(dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``vllm.LLM``: the weights' dtype, and on a CPU, no compilation."""
    return {"dtype": str(dtype).removeprefix("torch.")} | ({"enforce_eager": True} if _on_cpu() else {})


@contextmanager
def server_errors() -> Iterator[None]:
    """A context for requests to a server.

    Raises:
        RunError: It does not answer.
    """
    try:
        from requests import RequestException  # used by TRL's client, installed with trl[vllm]
    except ImportError:
        yield
        return
    try:
        yield
    except RequestException as error:
        raise RunError(
            f"vLLM's server does not answer: {error}", fix="Start it again, then resume from the last checkpoint."
        ) from error


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _reloading(llm: Any) -> Any:
    """Make an engine on a CPU accept weights as TRL sends them.

    TRL writes them to the model's parameters, one by one. On a CPU, vLLM (0.31) has packed these for its kernels and
    discarded them; its own ``reload_weights`` recreates them, from all weights at once.
    """
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    load, reset = runner.model.load_weights, llm.reset_prefix_cache
    arrived: list[tuple[str, torch.Tensor]] = []

    def collect(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        arrived.extend((name, weight.detach().clone()) for name, weight in weights)

    def reset_prefix_cache(*arguments: Any, **named: Any) -> Any:  # TRL calls this after the last weight
        if arrived:
            runner.model.load_weights = load
            runner.reload_weights(iter(arrived))
            runner.model.load_weights = collect
            arrived.clear()
        return reset(*arguments, **named)

    runner.model.load_weights, llm.reset_prefix_cache = collect, reset_prefix_cache
    return llm
