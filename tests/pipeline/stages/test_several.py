"""Recipes in several processes, started with ``accelerate launch -m trl_rlaif`` or with its environment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import forked, killing
from helpers.comparing import differences
from helpers.processes import environments, run_in_two
from helpers.recipes import write_prompts, write_recipe, write_rows
from safetensors.torch import load_file

from trl_rlaif import UserError, distributed
from trl_rlaif.files import append_lines, read_lines, write_folder
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.stages import check_processes
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

pytestmark = pytest.mark.slow

# Six rows per step: two or three processes take the same ones as one process.
_STEP = {"max_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 1e-2}
_TRAINED = {**_STEP, "max_steps": 2, "save_steps": 1}
_DPO = {"algorithm": "dpo", **_TRAINED}
# Averaged gradients are rounded differently, and the size of Adam's first steps does not depend on the gradient's.
TOLERANCE = 1e-4


def _write(folder: Path, model: str, **sections: object) -> Path:
    """Write a recipe with the given rl section, and its human-judged pairs and SFT data."""
    recipe = write_recipe(folder, model, **{**sections, "rl": None})
    written = yaml.safe_load(recipe.read_text()) | {"rl": sections["rl"]}
    recipe.write_text(yaml.safe_dump(written))
    write_prompts(folder / "train.jsonl", 12)
    said = [{"prompt": f"what is {i}?", "completion": "the fox " * (i % 3 + 1)} for i in range(12)]
    pairs = [
        {"id": f"p{i}", "prompt": f"what is {i}?", "response_1": "a city", "response_2": "the fox " * (i % 5 + 1),
         "human": 1 + i % 2}
        for i in range(12)
    ]  # fmt: skip
    for file, rows in (("sft.jsonl", said), ("pairs.jsonl", pairs)):
        write_rows(folder / file, rows)
    return recipe


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A recipe with nearly every stage, and its run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = _write(
        folder,
        tiny_model,
        data={"clusters": 2},
        judge={"contrasts": [], "pairs": "pairs.jsonl", "evaluations": 1, "warmup_steps": 0, **_STEP},
        label={"batch_tokens": 300, "compare": {"taught": {"judge": "taught"}}},
        reward={"eval_fraction": 0.3, **_STEP},
        rl=_DPO,
        evaluate={"max_new_tokens": 8, "batch_size": 2},
    )
    assert killing.run(recipe, folder / "one") == 0
    return recipe, folder / "one"


@pytest.mark.parametrize("count", [2, 3])
def test_a_recipes_artefacts_are_those_of_one_process(whole, count):
    recipe, one = whole
    out = one.parent / str(count)
    assert killing.run(recipe, out, processes=count) == 0
    found = differences(one, out)
    exact = {"pairs.jsonl", *(name for name in found if name.startswith("preferences/"))}
    assert {name: found[name] for name in exact} == dict.fromkeys(exact, 0.0) and len(exact) > 2
    adapters = {f"{part}/adapter_model.safetensors" for part in ("judge", "reward", "policy")}
    assert adapters | {"labels.jsonl", "samples.jsonl", "reward_scores.jsonl", "results.json"} <= found.keys()
    assert {name: by for name, by in found.items() if by > TOLERANCE} == {}
    assert 0 < max(found.values())  # rounding differs, so numbers were compared


def test_one_that_is_killed_ends_all_and_another_number_goes_on(tiny_model, tmp_path):
    sections = {"sample": None, "label": None, "reward": None, "evaluate": None, "report": None}
    data = {"prompts": None, "pairs": "pairs.jsonl", "format": "responses"}
    recipe = _write(tmp_path, tiny_model, sft={"data": "sft.jsonl", **_TRAINED}, rl=_DPO, data=data, **sections)
    written = yaml.safe_load(recipe.read_text())
    del written["data"]["prompts"]
    recipe.write_text(yaml.safe_dump(written))
    assert killing.run(recipe, tmp_path / "one") == 0
    out, log = tmp_path / "out", tmp_path / "log"
    command = "run", recipe, "--output", out
    first, second = (forked.start_command(*command, environment=of, output=str(log)) for of in environments(2))
    saved, deadline = out / "checkpoints" / "sft" / "checkpoint-1" / "content.json", time.monotonic() + 100
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(second.pid, signal.SIGKILL)
    first.join(100)
    first.kill()
    assert first.exitcode == 1 and "Another process of this run has ended" in log.read_text(), log.read_text()
    assert not (out / "policy").exists()
    assert killing.run(recipe, out, processes=3) == 0
    found = differences(tmp_path / "one", out)
    assert {"sft/adapter_model.safetensors", "policy/adapter_model.safetensors"} <= found.keys()
    assert {name: by for name, by in found.items() if by > TOLERANCE} == {}


def test_the_first_process_alone_writes_and_speaks(tiny_model, tmp_path):
    rl = {"selectors": [{"selective_rehearsal": {"clusters": 2, "per_cluster": 2}}]}
    evaluate = {"sets": {"forget": "test.jsonl"}, "track_every": 3}
    path, out = write_recipe(tmp_path, tiny_model, rl=rl, evaluate=evaluate), tmp_path / "out"
    printed = run_in_two("ddp", "-m", "trl_rlaif", "run", str(path), "--output", str(out))
    assert printed.count("rl: done in") == 1 and printed.count("The run is in") == 1
    folder = RunFolder(out)
    numbers = folder.results()["rl"]
    assert numbers["updates"] == 6 and numbers["episodes"] == 24 and numbers["rehearsal"]["pairs"] == 4
    rows = [row for row in read_lines(out / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rows if "objective/scores" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "forgetting/forget/nll" in row] == [0, 3, 6]
    assert load_file(out / "policy" / "adapter_model.safetensors")
    assert (out / "report.html").exists()
    # A single process finds nothing left to do.
    recipe = parse_recipe(path, registry=installed_plugins().registry)
    run_recipe(recipe, installed_plugins(), out, resume=True)
    assert folder.results()["rl"] == numbers and not (out / "superseded").exists()


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


def test_a_line_that_the_first_process_is_writing_is_left_to_it(tmp_path, as_second_of_two):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    assert read_lines(path) == [{"a": 1}]
    assert path.read_text().endswith('{"a"')


def test_batches_that_do_not_divide_are_refused_all_at_once(tmp_path, as_second_of_two):
    sft, odd = {"data": "train.jsonl", "per_device_train_batch_size": 3}, {"per_device_train_batch_size": 5}
    recipe = parse_recipe(write_recipe(tmp_path, "x", sft=sft, reward=odd), registry=installed_plugins().registry)
    with pytest.raises(UserError) as error:
        check_processes(recipe, [])
    places = {recipe.line((section,)) for section in ("sft", "reward")}
    assert {problem.where for problem in error.value.problems} == places
    assert "5 x 1 rows cannot be divided among 2 processes" in str(error.value)
    check_processes(recipe, ["rl"])


def test_bfloat16_on_the_processor_is_allowed_where_accelerate_numbers_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "join", lambda: SimpleNamespace(device=torch.device("cpu:1")))
    off = {"gradient_checkpointing": False}
    path = write_recipe(tmp_path, tiny_model, model={"dtype": "bfloat16"}, reward=off)
    recipe, plugins = parse_recipe(path, registry=installed_plugins().registry), installed_plugins()
    found = Context(recipe, RunFolder(tmp_path / "out"), plugins).trainer_arguments("reward", recipe.reward.config)
    assert found["bf16"] and found["use_cpu"]


def test_one_process_may_run_everything(tmp_path):
    odd = {"per_device_train_batch_size": 5}
    check_processes(parse_recipe(write_recipe(tmp_path, "x", reward=odd), registry=installed_plugins().registry), [])
    assert distributed.processes() == 1 and distributed.is_first()


def test_variables_of_a_cluster_alone_make_no_second_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.processes() == 1
