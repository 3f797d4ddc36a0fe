"""The GPU memory that the RL stage reports, on a pretended GPU."""

from __future__ import annotations

import torch
from helpers.recipes import tiny_recipe

from trl_rlaif.memory import plan_memory
from trl_rlaif.pipeline.rl_setup import gpu_memory


def test_the_measured_peak_stands_beside_the_predicted_one(tmp_path, tiny_model, monkeypatch):
    recipe = tiny_recipe(tmp_path, tiny_model)
    assert gpu_memory(recipe) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    found = gpu_memory(recipe)["gpu_memory"]
    plan = plan_memory(recipe)
    assert found["measured"] == 12345
    assert found["predicted"] == max(plan.predict(phase, stage) for stage, phase in plan.phases() if stage == "rl")
    assert found["predicted"] <= plan.allocated
