"""A run killed with -9 at any moment goes on where it was, and ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.recipes import write_recipe
from safetensors.torch import load_file

from trl_rlaif.artifacts import read_lines

COMMAND = [sys.executable, "-c", "import sys; from trl_rlaif.cli import main; sys.argv[0] = 'trl-rlaif'; main()"]


def _run(recipe: Path, output: Path) -> subprocess.Popen:
    arguments = [*COMMAND, "run", str(recipe), "--output", str(output), "--resume"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)


def _wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_in_every_stage(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model, label={"batch_tokens": 300}, report=None)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert _run(recipe, undisturbed).wait() == 0
    moments = {
        "sampling": lambda: len(read_lines_quietly(killed / "pairs.partial.jsonl")) >= 2,
        "labeling": lambda: len(read_lines_quietly(killed / "labels.jsonl")) >= 3,
        "training the reward": lambda: (killed / "preferences").exists(),
        "ppo": lambda: (killed / "checkpoints" / "rl" / "checkpoint-3").exists(),
    }
    for moment, reached in moments.items():
        process = _run(recipe, killed)
        _wait_for(reached, process)
        assert process.poll() is None, f"too fast to be killed: {moment}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _run(recipe, killed).wait() == 0
    for name in ("pairs.jsonl", "labels.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for name in ("reward", "policy"):
        ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for folder in (killed, undisturbed))
        assert all((ours[k] == theirs[k]).all() for k in theirs), name
    steps = [[r for r in read_lines(f / "metrics.jsonl") if r["stage"] == "rl"] for f in (killed, undisturbed)]
    for ours, theirs in zip(*steps, strict=True):
        ours.pop("eps"), theirs.pop("eps")
        assert ours == pytest.approx(theirs)


def read_lines_quietly(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []
