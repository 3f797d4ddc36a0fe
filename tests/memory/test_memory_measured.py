"""The planner against GPU measurements (benchmarks/results/gpu.json): within 10%, or not called measured."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest
from helpers.gpu_benchmarks import GPU

from trl_rlaif.memory import CONTEXT_BYTES, MARGIN, plan_memory

RECORDS = json.loads((GPU.parent / "results" / "gpu.json").read_text())
PHASES = {"generation": "generation", "forwards": "scoring", "update": "update"}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["setting"]["size"])
def test_what_was_measured_is_predicted_within_a_tenth(sides, tmp_path, record):
    setting, ours = record["setting"], record["ours"]
    size = importlib.import_module("models").SIZES[setting["size"]]
    size.config().save_pretrained(tmp_path)
    args = SimpleNamespace(
        batch=setting["batch"], updates=1, prompt=setting["prompt_tokens"], response=setting["response_tokens"],
        set=setting["set"],
    )  # fmt: skip
    plan = plan_memory(sides._recipe(args, size, tmp_path))
    assert "rl" in plan.measured
    gib = 2**30
    for measured, predicted in PHASES.items():
        assert plan.predict(predicted) / gib == pytest.approx(ours["gib_by_phase"][measured], rel=0.1), measured
    allocated = max(plan.predict(phase) for phase in PHASES.values())
    assert allocated / gib == pytest.approx(ours["gib"]["allocated"], rel=0.1)
    assert allocated * (1 + MARGIN) / gib == pytest.approx(ours["gib"]["reserved"], rel=0.1)
    assert (allocated * (1 + MARGIN) + CONTEXT_BYTES) / gib == pytest.approx(ours["gib"]["on_card"], rel=0.1)
