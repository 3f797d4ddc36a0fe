"""With tensors that pretend to be on a GPU: no operation mixes devices, and the number of waits for it is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "helpers" / "pretended_phases.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
# Maximum waits per call, with batches of a few rows. They include TRL's and transformers' own: one per forward pass
# with a mask, and most of those in a step of reward, dpo, rloo and grpo.
WAITS = {
    "ppo: select": 10, "ppo: draw": 15, "ppo: verify": 30, "ppo: score": 15, "ppo: transform": 25,
    "ppo: rewards per token": 0, "ppo: advantages": 0, "ppo: update": 20, "ppo: rehearse": 4, "ppo: metrics": 9,
    "ppo: load": 0, "judge: packed": 1, "judge: padded": 5, "judge: thinking": 4, "embeddings": 6, "ratios": 20,
    "sample": 3, "NLL": 14, "scores of responses": 12, "a loaded reward model": 4, "reward: step, packed": 14,
    "reward: step, padded": 15, "reward: scores of pairs": 6, "dpo: step": 25, "vllm: weights": 1,
    "rejection: select": 180, "rejection: fine-tune": 40,
    "rloo: verify": 32, "rloo: step": 70, "rloo: rehearse": 6, "rloo: draw": 18, "rloo: score": 4, "rloo: transform": 9,
    "grpo: verify": 32, "grpo: step": 70, "grpo: rehearse": 6, "grpo: draw": 18, "grpo: score": 4, "grpo: transform": 9,
    # Each tensor is copied for the file.
    "ppo: save": 300,
    # Between the phases, in the whole script.
    "outside": 110,
}  # fmt: skip
# transformers' own waits per decoded token, and the same number once per call.
A_TOKEN = 3


@pytest.fixture(scope="module")
def seen():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_what_mixes_and_what_waits_is_seen(seen):
    probe = seen["probe"]
    assert [line.split(" at ")[0] for line in probe["mixed"]] == ["add"]
    assert sorted(line.split(" at ")[0] for line in probe["waits"]) == ["_local_scalar_dense", "index"]


def test_no_operation_mixes_devices(seen):
    assert not {name: phase["mixed"] for name, phase in seen.items() if phase["mixed"] and name != "probe"}


def test_every_wait_is_bounded(seen):
    phases = {name: phase for name, phase in seen.items() if name != "probe" and not name.endswith(", decoding")}
    assert phases.keys() == WAITS.keys()
    found = {name: sum(phase["waits"].values()) / phase["calls"] for name, phase in phases.items()}
    more = {name: (count, phases[name]["waits"]) for name, count in found.items() if count > WAITS[name]}
    assert not more


def test_decoding_waits_for_what_transformers_asks_after_each_token(seen):
    decoding = {name: phase for name, phase in seen.items() if name.endswith(", decoding")}
    assert {"ppo: draw, decoding", "sample, decoding", "grpo: draw, decoding"} <= decoding.keys()
    for name, phase in decoding.items():
        assert sum(phase["waits"].values()) <= A_TOKEN * (phase["tokens"] + phase["calls"]), (name, phase["waits"])
