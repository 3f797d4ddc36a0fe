"""Runs in several processes: started with ``accelerate launch``, as users do, or forked with its environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from helpers import forked
from trl_rlaif import distributed
from trl_rlaif.recipe.paths import recipes_dir

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# `--cpu` cannot be used: without MPI, accelerate then silently starts a single process.
OF_DDP = {"ACCELERATE_USE_CPU": "true"}
# accelerate's names for them.
_KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "fsdp2": "FSDP"}
_OF_FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def _free_port() -> int:
    """Tests run in parallel, so the default port may be taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write a process's result for ``launch`` or ``fork`` to read, and exit."""
    state = PartialState()
    found = result | {"kind": state.distributed_type.value, "processes": state.num_processes}
    torch.save(found, folder / f"{state.process_index}.pt")
    distributed.wait()
    sys.stdout.flush()
    # Interpreter shutdown destroys objects in no fixed order (a failed run's models, gloo's threads), which sometimes
    # aborts the process. That is not what these tests are about.
    os._exit(0)


def launch(kind: str, script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a script in two processes; returns what each of them wrote with ``write_result``."""
    run_in_two(kind, script, str(folder), *arguments)
    return _results(folder, _KINDS[kind])


def environments(count: int, kind: str = "ddp") -> list[dict[str, str]]:
    """The environment that the ddp or fsdp2 launcher sets for each of ``count`` processes; empty for a single one."""
    if count == 1:
        return [{}]
    shared = ENVIRONMENT | OF_DDP | (_OF_FSDP if kind == "fsdp2" else {}) | {"ACCELERATE_MIXED_PRECISION": "no"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def fork(script: str, folder: Path, *arguments: str, count: int = 2) -> list[dict[str, Any]]:
    """Like ``launch`` with ddp in ``count`` processes, but without the launcher and the imports of each process.

    Anything decided at import time, such as whether a process prints, is as in a single process.
    """
    call = (forked.run_script, script, [str(folder), *arguments])
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [forked.start(*call, environment=each, output=output.name) for each in environments(count)]
        waiting, ended = processes, [True]
        try:
            while waiting and ended and not any(process.exitcode for process in processes):
                ended = connection.wait([process.sentinel for process in waiting], timeout=600)
                waiting = [process for process in waiting if process.sentinel not in ended]
        finally:
            for process in processes:
                process.kill()  # a process waits forever for one that has failed
                process.join()
        printed = output.read()
    assert [process.exitcode for process in processes] == [0] * count, printed[-4000:]
    return _results(folder, _KINDS["ddp"], count)


def _results(folder: Path, kind: str, count: int = 2) -> list[dict[str, Any]]:
    results = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    assert [result["kind"] for result in results] == [kind] * count
    return results


def run_in_two(kind: str, *arguments: str) -> str:
    """Run ``accelerate launch`` as users do, with a packaged configuration, on gloo; returns the output."""
    config = recipes_dir() / "accelerate" / f"{kind}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", str(_free_port())]
    command += arguments
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if kind != "zero2":
        environment |= OF_DDP
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers too: they survive the launcher
        pytest.fail(f"The processes did not end:\n{process.communicate()[0][-4000:]}")
    assert process.returncode == 0, output[-4000:]
    return output
