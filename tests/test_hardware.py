"""The speed of a machine's data types, and the defaults that follow from it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from helpers.recipes import tiny_recipe, write_recipe

from trl_rlaif import PPOConfig, RewardConfig, UserError, cli, hardware
from trl_rlaif.pipeline import redo, runner
from trl_rlaif.pipeline.machine import machine_of, say_where, settled
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe

SLOW, FAST = 21.0, 0.2


@pytest.fixture
def machine(monkeypatch):
    """Pretend that bfloat16 slows this processor down by a factor."""

    def pretend(slowdown):
        monkeypatch.setattr(hardware, "bfloat16_slowdown", lambda: slowdown)
        monkeypatch.setattr(hardware, "device_type", lambda: "cpu")
        hardware._say_once.cache_clear()

    return pretend


@pytest.mark.skipif("AVX2" not in (sys.platform, *open("/proc/cpuinfo").read().upper().split()), reason="no AVX2")
def test_a_processor_without_bfloat16_is_found_out():
    code = (
        "from trl_rlaif.hardware import *; print(bfloat16_slowdown(), computes_bfloat16('cpu'), fastest_dtype('cpu'))"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    slowdown, computes, fastest = out.split()
    assert float(slowdown) > 2 and (computes, fastest) == ("False", "float32")


@pytest.mark.parametrize(("slowdown", "dtype"), [(SLOW, "float32"), (FAST, "bfloat16")])
def test_auto_is_settled_for_the_base_and_for_every_judge(machine, tmp_path, tiny_model, slowdown, dtype):
    machine(slowdown)
    judge = {"path": tiny_model}
    label = {"judge": judge, "compare": {"other": {"judge": {**judge, "dtype": "float16"}}, "third": {"judge": judge}}}
    evaluate = {"judges": {"second": {"judge": judge}}}
    recipe = tiny_recipe(tmp_path, tiny_model, model={"dtype": "auto"}, label=label, evaluate=evaluate)
    here = machine_of(RunFolder(tmp_path / "run"))
    found = settled(recipe, here)
    assert found.model.dtype == found.label.judge.dtype == found.evaluate.judges["second"].judge.dtype == dtype
    assert [c.judge.dtype for c in found.label.compare.values()] == ["float16", dtype]
    assert found.model.matmul_precision == "highest"
    assert settled(found, here) == found


def test_a_run_stays_what_it_was_begun_as_on_another_machine(machine, tmp_path, tiny_model, capsys):
    machine(FAST)
    recipe, folder = tiny_recipe(tmp_path, tiny_model, model={"dtype": "auto"}), RunFolder(tmp_path / "run")
    first = settled(recipe, machine_of(folder))
    runner._write_recipe(first, folder, "", machine_of(folder))
    for planned in redo.plan(recipe, folder).values():
        folder.begin(planned.stage.name, planned.fingerprint, planned.inputs.to_dict())
    machine(SLOW)
    again = settled(recipe, machine_of(folder))
    assert again == first and again.model.dtype == "bfloat16"
    assert redo.redone(redo.plan(recipe, folder)) == []
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del written["model"]["dtype"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    unwritten = parse_recipe(tmp_path / "recipe.yaml", registry=installed_plugins().registry)
    assert unwritten.model.dtype == "auto" and redo.redone(redo.plan(unwritten, folder)) == []
    say_where(again, machine_of(folder))
    assert "takes 21 times as long" in capsys.readouterr().err.replace("\n", " ")
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert saved["model"]["dtype"] == saved["machine"]["dtype"] == "bfloat16" and saved["machine"]["processor"]


def test_a_folder_of_an_earlier_version_keeps_its_meaning_of_auto(machine, tmp_path, tiny_model):
    machine(FAST)
    recipe, folder = tiny_recipe(tmp_path, tiny_model, model={"dtype": "auto"}), RunFolder(tmp_path / "run")
    (folder / "recipe.yaml").write_text("run: {name: old}\n")
    assert settled(recipe, machine_of(folder)).model.dtype == "auto"
    assert settled(recipe, machine_of(folder)).model.matmul_precision == "highest"
    for broken in ("run: {name: old}\nmachine: cpu\n", "run: {name: old}\nmachine: {dtype: x}\n", "[", "1"):
        (folder / "recipe.yaml").write_text(broken)
        with pytest.raises(UserError, match="Restore the run's own copy"):
            machine_of(folder)


@pytest.mark.parametrize("config", [PPOConfig, RewardConfig])
def test_bf16_is_off_where_it_is_slow_and_obeyed_where_it_is_written(machine, tmp_path, config, capsys):
    def made(**given):
        found = config(str(tmp_path), use_cpu=True, report_to=[], **given).bf16
        return found, capsys.readouterr().err.replace("\n", " ")

    machine(FAST)
    assert made() == (True, "") and made(bf16=False) == (False, "") and made(fp16=True)[0] is False
    machine(SLOW)
    bf16, said = made()
    assert not bf16 and "bf16 is off" in said
    bf16, said = made(bf16=True)
    assert bf16 and "bf16 is on, which this processor emulates" in said and "21 times" in said
    assert made(bf16=True) == (True, "")  # said only once


def test_the_processor_is_taken_where_accelerate_is_told_so():
    code = "from trl_rlaif import distributed; print(distributed.join()._cpu)"
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "True\n"


def test_machines_that_share_labels_hold_the_judge_alike(tmp_path, tiny_model):
    recipe = tiny_recipe(tmp_path, tiny_model, model={"dtype": "auto"})
    with pytest.raises(UserError, match="With dtype: auto.*Set dtype: float32 or bfloat16"):
        runner.run_recipe(recipe, installed_plugins(), tmp_path / "run", shard="1/2")


ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "release", "expected"),
    [
        ({}, "6.1.0", "expandable_segments:True"),
        ({}, "5.15.90.1-microsoft-standard-WSL2", None),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "6.1.0", ""),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "6.1.0", None),
    ],
)
def test_memory_grows_in_place_unless_the_environment_says_otherwise(monkeypatch, given, release, expected):
    for name in ALLOCATORS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.platform, "release", lambda: release)
    hardware.let_memory_grow()
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None) == expected


@pytest.mark.parametrize(("sleeps", "grows"), [(True, False), (False, True)])
def test_the_command_lets_memory_grow_but_not_next_to_a_sleeping_engine(
    monkeypatch, tmp_path, tiny_model, sleeps, grows
):
    class Stop(Exception):
        pass

    called = []
    monkeypatch.setattr(hardware, "let_memory_grow", lambda: called.append(True))
    monkeypatch.setattr(cli, "_check_inputs", lambda parsed, plugins: (_ for _ in ()).throw(Stop))
    path = write_recipe(tmp_path, tiny_model, rl={"generation": "vllm", "vllm_enable_sleep_mode": sleeps})
    with pytest.raises(Stop):
        cli.run(str(path))
    assert bool(called) == grows


# ---- Systems without fcntl, bitsandbytes or CUDA --------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """Run Python as on a system without fcntl (Windows) and without bitsandbytes (a Mac)."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules |= {'fcntl': None, 'bitsandbytes': None}\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    return lambda *words: subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)


def test_import_and_check_without_fcntl_and_bitsandbytes(bare, tmp_path, tiny_model):
    tiny_recipe(tmp_path, tiny_model)
    code = "import trl_rlaif.cli, trl_rlaif.pipeline.runner, trl_rlaif.status, trl_rlaif.rating, trl_rlaif.report"
    imported = bare("-c", code)
    assert imported.returncode == 0, imported.stderr
    checked = bare("-m", "trl_rlaif", "check", str(tmp_path / "recipe.yaml"))
    assert checked.returncode == 0 and "good" in checked.stdout, checked.stderr


def test_nf4_without_bitsandbytes_and_mps_are_refused_before_anything_is_loaded(
    machine, monkeypatch, tmp_path, tiny_model
):
    machine(SLOW)
    # (Hiding it from Python would affect other libraries, also in later tests.)
    monkeypatch.setattr("trl_rlaif.pipeline.machine._is_installed", lambda package: False)
    judge = {"path": tiny_model, "quantization": "nf4"}
    for sections in ({"model": {"quantization": "nf4"}}, {"label": {"compare": {"other": {"judge": judge}}}}):
        recipe = tiny_recipe(tmp_path, tiny_model, **sections)
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            runner.run_recipe(recipe, installed_plugins(), tmp_path / "run")
    monkeypatch.setattr(hardware, "device_type", lambda: "mps")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=true"):
        runner.run_recipe(tiny_recipe(tmp_path, tiny_model), installed_plugins(), tmp_path / "run")
