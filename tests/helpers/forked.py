"""Processes that start with a run's imports already loaded, which take a fresh interpreter eight seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

# Loaded once, by the fork server.
_PRELOADED = [
    "trl_rlaif",
    "trl_rlaif.pipeline.runner",
    "trl_rlaif.pipeline.stages",
    "trl_rlaif.pipeline.work.sample",
    "trl_rlaif.pipeline.work.label",
    "trl_rlaif.pipeline.work.grpo_rloo",
    "trl_rlaif.pipeline.work.ppo",
    "trl_rlaif.pipeline.trial",
    "trl_rlaif.labels.calibration",
    "trl_rlaif_distilled",
    "trl.trainer.reward_trainer",  # which loads peft and bitsandbytes, as a run does
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "datasets",
]


def start(
    call: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    output: str = os.devnull,
) -> BaseProcess:
    """Call a module-level function in a separate process; its output is appended to ``output``.

    Unlike fresh interpreters, these processes all iterate over a set of strings in the same order.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    variables = {**os.environ, **(environment or {})}
    process = context.Process(target=_call, args=(call, arguments, variables, output))
    process.start()
    return process


def start_command(*arguments: object, **options: Any) -> BaseProcess:
    """Start ``trl-rlaif ARGUMENTS``; the process exits with the command's exit code."""
    return start(run_command, [str(argument) for argument in arguments], **options)


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python script ARGUMENTS`` does."""
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_command(arguments: list[str]) -> None:
    """Run the command ``trl-rlaif ARGUMENTS``."""
    from trl_rlaif.cli import main

    sys.argv = ["trl-rlaif", *arguments]
    main()


def allow_fsdp_on_cpu() -> None:
    """Make accelerate use FSDP on CPUs when configured to; otherwise, it silently uses DDP.

    torch's FSDP itself works on CPUs.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    from accelerate import DistributedType, PartialState

    begin = PartialState.__init__

    def begin_as_gpus(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus


def _call(call: Callable[..., Any], arguments: Sequence[Any], variables: Mapping[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    allow_fsdp_on_cpu()
    call(*arguments)
