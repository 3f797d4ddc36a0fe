"""Sharding weights with FSDP: unsupported settings are refused before anything is loaded."""

from __future__ import annotations

import pytest
from helpers.processes import environments
from helpers.recipes import write_recipe

from trl_rlaif import UserError
from trl_rlaif.models import sharding
from trl_rlaif.pipeline.stages import check_processes
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe


@pytest.fixture
def with_fsdp(monkeypatch):
    """A function that sets the launcher's variables for the first of two processes, and others."""

    def set_them(**variables):
        for name, value in (environments(2, "fsdp2")[0] | variables).items():
            monkeypatch.setenv(name, value)

    return set_them


def _refused(tmp_path, only=(), **rl):
    sizes = {"per_device_train_batch_size": 2}
    path = write_recipe(tmp_path, "x", reward=sizes, rl=sizes | rl)
    recipe = parse_recipe(path, registry=installed_plugins().registry)
    with pytest.raises(UserError) as error:
        check_processes(recipe, only)
    return recipe, error.value.problems


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "True", "fsdp_cpu_ram_efficient_loading: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing: true"),
    ],
)
def test_what_the_launcher_must_not_be_told(tmp_path, with_fsdp, variable, value, fix):
    with_fsdp(**{variable: value})
    _, problems = _refused(tmp_path)
    assert len(problems) == 1 and fix in problems[0].fix


def test_zero_3_is_refused(tmp_path, with_fsdp):
    with_fsdp(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    _, problems = _refused(tmp_path)
    assert len(problems) == 1 and "ZeRO-3" in problems[0].what and "fsdp2" in problems[0].fix


@pytest.mark.parametrize(
    ("rl", "key"),
    [
        ({"algorithm": "rejection_sampling", "selectors": ["rejection_sampling"]}, "algorithm"),
        ({"generation": "vllm"}, "generation"),
        ({"algorithm": "grpo", "use_vllm": True}, "use_vllm"),
    ],
)
def test_what_a_recipe_must_not_ask_for(tmp_path, with_fsdp, rl, key):
    with_fsdp()
    recipe, problems = _refused(tmp_path, **rl)
    assert [problem.where for problem in problems] == [recipe.line(("rl", key))]
    assert "with FSDP" in problems[0].what
    check_processes(recipe, ["reward"])


def test_the_packaged_configuration_is_taken(tmp_path, with_fsdp):
    with_fsdp()
    check_processes(parse_recipe(write_recipe(tmp_path, "x"), registry=installed_plugins().registry), [])
    assert sharding.requested()


def test_nothing_is_refused_in_one_process(monkeypatch):
    for name, value in environments(2, "fsdp2")[0].items():
        if name != "LOCAL_RANK":
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert not sharding.requested() and not list(sharding.problems())
