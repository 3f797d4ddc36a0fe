"""A recipe's stage rl in two processes, started with ``accelerate launch -m trl_rlaif``."""

from __future__ import annotations

import pytest
from helpers.processes import run_in_two
from helpers.recipes import write_recipe
from safetensors.torch import load_file

from trl_rlaif import UserError, distributed
from trl_rlaif.files import append_lines, read_lines, write_folder
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import check_processes
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import (
    DataSection,
    LabelSection,
    ModelSection,
    Recipe,
    RewardSection,
    RlSection,
    RunSection,
    SampleSection,
    SftSection,
    parse_recipe,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def labeled(tiny_model, tmp_path_factory):
    """A run up to the reward model, and the recipe."""
    folder = tmp_path_factory.mktemp("several")
    rl = {"per_device_train_batch_size": 2, "selectors": [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}]}
    evaluate = {"sets": {"forget": "test.jsonl"}, "track_every": 3}
    path = write_recipe(folder, tiny_model, rl=rl, evaluate=evaluate)
    recipe = parse_recipe(path, registry=installed_plugins().registry)
    run_recipe(recipe, installed_plugins(), folder / "out", only=["sample", "label", "reward"])
    return path, folder / "out"


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_first_process_alone_writes_and_speaks(labeled, algorithm):
    path, out = labeled
    override = f"rl.algorithm={algorithm}"
    command = ["run", str(path), "--output", str(out), "--only", "rl", "--set", override]
    printed = run_in_two("ddp", "-m", "trl_rlaif", *command)
    assert printed.count("rl: done in") == 1 and printed.count("The run is in") == 1
    folder = RunFolder(out)
    numbers = folder.results()["rl"]
    assert numbers["updates"] == 6 and numbers["episodes"] == 24 and numbers["rehearsal"]["pairs"] == 4
    rows = [row for row in read_lines(out / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rows if "objective/scores" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "forgetting/forget/nll" in row] == [0, 3, 6]
    assert load_file(out / "policy" / "adapter_model.safetensors")
    # One process goes on from there.
    recipe = parse_recipe(path, overrides=[override], registry=installed_plugins().registry)
    run_recipe(recipe, installed_plugins(), out, resume=True)
    assert (out / "report.html").exists() and folder.results()["rl"] == numbers


@pytest.fixture
def as_second_of_two(monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_another_process_than_the_first_changes_nothing(tmp_path, as_second_of_two):
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.begin("rl", "a")
        folder.add_metrics("rl", 1, {"loss": 1.0})
        folder.add_results("rl", {"loss": 1.0})
        folder.complete("rl", "a")
        append_lines(tmp_path / "lines.jsonl", [{}])
        write_folder(tmp_path / "policy", lambda path: pytest.fail("written"))
    assert {path.name for path in tmp_path.rglob("*")} == {".state"}


def test_another_stage_is_refused_with_the_commands_to_write(as_second_of_two):
    recipe = Recipe(RunSection(name="x"), ModelSection(path="x"), DataSection(prompts="x"),
                    sample=SampleSection(), label=LabelSection(), reward=RewardSection(), rl=RlSection())  # fmt: skip
    with pytest.raises(UserError, match="2 processes share the stage rl alone.*") as error:
        check_processes(recipe, [])
    assert "--only sample,label,reward with one process, then --only rl with several" in str(error.value)
    with pytest.raises(UserError, match="rl alone"):
        check_processes(recipe, ["label", "rl"])
    check_processes(recipe, ["rl"])


def test_one_process_may_run_everything():
    check_processes(Recipe(RunSection(name="x"), ModelSection(path="x"), DataSection(), sft=SftSection(data="x")), [])
    assert distributed.processes() == 1 and distributed.is_first()


def test_variables_of_a_cluster_alone_make_no_second_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.processes() == 1
