"""Recipes in two processes with sharded weights (FSDP2), compared with one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import killing
from helpers.comparing import differences
from helpers.recipes import write_recipe, write_rows

pytestmark = pytest.mark.slow

_TRAINED = {"per_device_train_batch_size": 6, "learning_rate": 1e-2, "max_steps": 2, "save_steps": 1}
# Averaged gradients are rounded differently, and the size of Adam's first steps does not depend on the gradient's.
TOLERANCE = 1e-4


def _of_people(folder: Path, model: str) -> Path:
    """A recipe with SFT, and a reward model and DPO on human-labeled pairs."""
    pairs = [
        {"id": f"p{i}", "prompt": f"what is {i}?", "response_1": "a city", "response_2": "the fox " * (i % 5 + 1),
         "human": 1 + i % 2}
        for i in range(24)
    ]  # fmt: skip
    said = [{"prompt": f"what is {i}?", "completion": "the fox " * (i % 3 + 1)} for i in range(12)]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "sft.jsonl", said)
    return write_recipe(
        folder,
        model,
        data={"prompts": None, "eval_prompts": None, "pairs": "pairs.jsonl", "format": "responses"},
        sft={"data": "sft.jsonl", **_TRAINED},
        reward={"eval_fraction": 0.3, "batch_tokens": 40, **_TRAINED},
        rl={"algorithm": "dpo", **_TRAINED},
        **dict.fromkeys(("sample", "label", "evaluate", "report")),
    )


def test_fine_tuning_reward_and_dpo_are_those_of_one_process(tiny_model, tmp_path):
    recipe = _of_people(tmp_path, tiny_model)
    assert killing.run(recipe, tmp_path / "one") == 0, (tmp_path / "one.log").read_text()
    assert killing.run(recipe, tmp_path / "two", processes=2, launcher="fsdp2") == 0, (tmp_path / "two.log").read_text()
    found = differences(tmp_path / "one", tmp_path / "two")
    adapters = {f"{part}/adapter_model.safetensors" for part in ("sft", "reward", "policy")}
    assert adapters | {"metrics.jsonl", "results.json", "reward_scores.jsonl"} <= found.keys()
    assert {name: by for name, by in found.items() if by > TOLERANCE} == {}
    # Checkpoints match those of one process, too: adapters only, and an unsharded optimizer.
    ours, theirs = (tmp_path / name / "checkpoints" / "rl" / "checkpoint-2" for name in ("two", "one"))
    assert {path.name for path in theirs.iterdir()} - {path.name for path in ours.iterdir()} == {"rng_state.pth"}
    states = [torch.load(of / "optimizer.pt", weights_only=True)["state"] for of in (ours, theirs)]
    assert states[0].keys() == states[1].keys() != set()
    for mine, other in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(mine["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-5)
