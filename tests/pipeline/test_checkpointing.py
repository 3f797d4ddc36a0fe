"""Gradient checkpointing that a recipe does not set: on if the planner finds that memory requires it."""

from __future__ import annotations

import pytest
from helpers.recipes import tiny_recipe

from trl_rlaif import hardware
from trl_rlaif.distributed import processes_here
from trl_rlaif.memory import CONTEXT_BYTES, MARGIN, plan_memory
from trl_rlaif.memory.settings import with_settings
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.rl_setup import gpu_memory
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.plugins import installed_plugins

STAGES = ("sft", "reward", "rl")


@pytest.fixture
def arguments(tmp_path, tiny_model, monkeypatch):
    """A stage's ``gradient_checkpointing`` on a device with ``room`` bytes, and the context that decided it."""

    def arguments(stage, room, device="cpu", **sections):
        sections["rl"] = {"max_prompt_length": 24, **sections.get("rl", {})}
        recipe = tiny_recipe(tmp_path, tiny_model, sft={"data": "train.jsonl"}, **sections)
        context = Context(recipe, RunFolder(tmp_path / "run"), installed_plugins())
        monkeypatch.setattr(hardware, "device_type", lambda: device)
        monkeypatch.setattr(hardware, "available_memory", lambda _: room)
        config = getattr(recipe, stage).config
        found = context.trainer_arguments(stage, config)["gradient_checkpointing"]
        assert context.trainer_arguments(stage, config)["gradient_checkpointing"] is found
        monkeypatch.undo()
        return found, context

    return arguments


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", STAGES)
def test_it_is_on_where_activations_do_not_fit(arguments, capsys, stage, device):
    _, context = arguments(stage, 2**40, device)
    plan = plan_memory(context.recipe, only=stage)
    without = CONTEXT_BYTES + int((1 + MARGIN) * plan.predict("update", stage))
    capsys.readouterr()
    assert arguments(stage, without // 0.9 + 1, device)[0] is False
    said = capsys.readouterr().err
    assert said.count(f"{stage}: gradient checkpointing is off: ") == 1 and f"{without / 2**30:.1f} GiB" in said
    assert arguments(stage, without // 0.9 - 1, device)[0] is True
    assert f"{stage}: gradient checkpointing is on: " in capsys.readouterr().err


@pytest.mark.parametrize("written", [False, True])
def test_what_a_recipe_says_is_obeyed(arguments, capsys, written):
    for room in (1, 2**40):
        assert arguments("rl", room, rl={"gradient_checkpointing": written})[0] is written
    assert "checkpointing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "rl", [{"algorithm": "grpo", "per_device_train_batch_size": 8}, {"generation": "vllm"}], ids=str
)
def test_what_the_planner_does_not_know_computes_again_on_a_gpu(arguments, capsys, rl):
    assert arguments("rl", 2**40, "cuda", rl=rl)[0] is True
    assert arguments("rl", 2**40, "cpu", rl=rl)[0] is False
    assert "checkpointing" not in capsys.readouterr().err


def test_an_architecture_that_the_planner_does_not_know(arguments, monkeypatch):
    def unknown(*_, **__):
        raise AttributeError("num_attention_heads")

    for device, expected in (("cuda", True), ("cpu", False)):
        monkeypatch.setattr("trl_rlaif.memory.plan_memory", unknown)
        assert arguments("rl", 2**40, device)[0] is expected


def test_on_a_cpu_an_update_is_planned_with_as_many_tokens_as_it_takes_at_once(arguments):
    large = {"per_device_train_batch_size": 4096, "total_episodes": 4096, "max_prompt_length": 500}
    room = 3 * 2**30
    assert arguments("rl", room, "cpu", rl=large)[0] is False
    assert arguments("rl", room, "cuda", rl=large)[0] is True


def test_the_measured_peak_is_compared_with_the_plan_of_what_ran(arguments, monkeypatch):
    import torch

    _, context = arguments("rl", 2**40, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    kept = gpu_memory(context.recipe)["gpu_memory"]["predicted"]
    again = with_settings(context.recipe, {("rl", "gradient_checkpointing"): True})
    assert kept > gpu_memory(again)["gpu_memory"]["predicted"]


def test_processes_of_this_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_here() == 1  # set by a launcher for another program
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert processes_here() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes_here() == 8


def test_memory_at_hand(tmp_path, monkeypatch):
    own = tmp_path / "groups" / "user.slice" / "job.scope"
    own.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/user.slice/job.scope\n")
    monkeypatch.setattr(hardware, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(hardware, "_GROUP", tmp_path / "cgroup")
    free = hardware.available_memory("cpu")
    assert 2**27 < free < 2**45
    (own / "memory.max").write_text("max\n")
    assert hardware.available_memory("cpu") > free / 2
    for group, limit in ((tmp_path / "groups", 2**26), (own.parent, 2**25), (own, 2**24)):  # the lowest counts
        (group / "memory.max").write_text(f"{limit}\n")
        assert hardware.available_memory("cpu") == limit
