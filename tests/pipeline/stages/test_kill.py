"""A run killed with -9 at any moment goes on where it was, and ends as an undisturbed one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers import forked
from helpers.killing import start_labeling
from helpers.recipes import write_recipe
from safetensors.torch import load_file

from trl_rlaif.files import read_lines

pytestmark = pytest.mark.slow


def _run(recipe: Path, output: Path) -> BaseProcess:
    return forked.start_command("run", recipe, "--output", output, "--resume")


def _wait_for(condition, process: BaseProcess, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_in_every_stage(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model, label={"batch_tokens": 300}, report=None)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    # By a fresh interpreter: what follows from its random order of sets would show in the comparison.
    command = [sys.executable, "-m", "trl_rlaif", "run", str(recipe), "--output", str(undisturbed)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    moments = {
        "sampling": lambda: len(read_lines_quietly(killed / "pairs.partial.jsonl")) >= 2,
        "labeling": lambda: len(read_lines_quietly(killed / "labels.jsonl")) >= 3,
        "training the reward": lambda: (killed / "preferences").exists(),
        "ppo": lambda: (killed / "checkpoints" / "rl" / "checkpoint-3").exists(),
    }
    for moment, reached in moments.items():
        process = _run(recipe, killed)
        _wait_for(reached, process)
        assert process.is_alive(), f"too fast to be killed: {moment}"
        process.kill()
        process.join()
    process = _run(recipe, killed)
    process.join()
    assert process.exitcode == 0
    for name in ("pairs.jsonl", "labels.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for name in ("reward", "policy"):
        ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for folder in (killed, undisturbed))
        assert all((ours[k] == theirs[k]).all() for k in theirs), name
    steps = [[r for r in read_lines(f / "metrics.jsonl") if r["stage"] == "rl"] for f in (killed, undisturbed)]
    for ours, theirs in zip(*steps, strict=True):
        timed = {name for name in theirs if name == "eps" or name.startswith("time/")}
        assert {k: ours[k] for k in ours.keys() - timed} == pytest.approx({k: theirs[k] for k in theirs.keys() - timed})


def test_labels_survive_kills_at_random_moments(tiny_model, tmp_path):
    """More moments, in the label stage alone: the same lines in the same order, to the last bit."""
    rest = dict.fromkeys(("sample", "reward", "rl", "evaluate", "report"))
    data = {"prompts": None, "pairs": "pairs.jsonl"}
    recipe = write_recipe(tmp_path, tiny_model, label={"batch_tokens": 900}, data=data, **rest)
    rows = [
        {"prompt": f"what is {i}?", "response_1": "a city", "response_2": "the fox " * (i % 5 + 1)} for i in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start_labeling(recipe, undisturbed, 0)
    process.join(120)
    assert process.exitcode == 0
    lines = (undisturbed / "labels.jsonl").read_bytes().splitlines()
    assert len(lines) == 24
    for third in range(3):
        goal = random.randrange(third * len(lines) // 3 + 1, (third + 1) * len(lines) // 3)
        process = start_labeling(recipe, killed, 0.02)
        deadline = time.monotonic() + 120
        while len(read_lines_quietly(killed / "labels.jsonl")) < goal and time.monotonic() < deadline:
            assert process.is_alive(), "ended before it could be killed"
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.join()
        assert goal <= len(read_lines_quietly(killed / "labels.jsonl")) < len(lines)
    process = start_labeling(recipe, killed, 0)
    process.join(120)
    assert process.exitcode == 0
    assert (killed / "labels.jsonl").read_bytes() == (undisturbed / "labels.jsonl").read_bytes()


def read_lines_quietly(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []
