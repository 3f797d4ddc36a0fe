"""The kit for a GPU machine runs from end to end on a CPU, where it has a tiny model."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"


def test_the_steps_on_a_cpu(tmp_path):
    """What is run on the lent machine, in its order, but for stock TRL and smaller cards."""
    out, steps = tmp_path / "out", ("checks", "model8b", "speed", "ablation", "pairs")
    environment = os.environ | {"DEVICE": "cpu", "OUT": str(out), "KEEP": str(tmp_path / "keep"), "DEADLINE": "9000"}
    environment |= {"PYTHON": sys.executable, "STEPS": " ".join(steps), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(GPU / "on_gpu.sh"), "main"], env=environment, cwd=ROOT, capture_output=True)
    log = (out / "log.txt").read_text()
    table = [line.split() for line in (out / "table.txt").read_text().splitlines()]
    assert [(row[0], row[-1]) for row in table] == [(name, "0") for name in steps], log[-4000:]
    assert "WRONG" not in log and "FAILED" not in log, log[-4000:]
    numbers = {name: json.loads((out / f"{name}.json").read_text()) for name in ("checks", "speed", "pairs")}
    assert len(numbers["checks"]) > 20 and all(isinstance(value, int | float) for value in numbers["checks"].values())
    assert numbers["speed"]["ms a token, 4 rows, cast_weights on"] > 0
    assert numbers["pairs"]["pairs, nf4, 900+120, packed, fused: pairs a second"] > 0
    ours, ablated = (record["ours"] for record in json.loads((out / "gpu.json").read_text()))
    assert "error" not in ours and "error" not in ablated
    assert len(ours["updates"]) == 1 and ours["seconds"]["generation"] > 0 and ours["seconds"]["update"] > 0
    assert ours["gib"].keys() == {"resident"} and ours["predicted_gib"] > 0
    assert "measured_over_predicted" not in ours  # a CPU's resident set is not what was predicted
    updates = ablated["ablation"]
    off = [update["without"] for update in updates]
    assert off == ["", "", "fused_lora", "cast_weights", "logprob_head", "all", ""]
    assert all(update["seconds"]["generation"] > 0 for update in updates)
    assert b"checks ok" in done.stdout


def test_no_operation_of_an_update_mixes_devices():
    done = subprocess.run([sys.executable, str(GPU / "pretend.py")], capture_output=True, text=True)
    phases = [line for line in done.stdout.splitlines() if line.startswith("==")]
    assert done.returncode == 0 and len(phases) == 3, done.stderr[-3000:]
    assert all(": 0 mixed, " in line for line in phases), done.stdout


def test_a_wheel_loses_the_libraries_that_are_not_needed(tmp_path):
    wheel = tmp_path / "some.whl"
    kept = {"some/lib_cpu.so": b"1", "some/code.py": b"2"}
    record = b"some/lib_cpu.so,,\nsome/lib_cuda118.so,,\nsome/code.py,,\nsome.dist-info/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as writing:
        for name, data in (kept | {"some/lib_cuda118.so": b"3", "some.dist-info/RECORD": record}).items():
            writing.writestr(name, data)
    subprocess.run([sys.executable, str(GPU / "slim_wheel.py"), str(wheel), "_cpu.so"], check=True)
    with zipfile.ZipFile(wheel) as reading:
        assert reading.namelist() == [*kept, "some.dist-info/RECORD"]
        assert b"cuda118" not in reading.read("some.dist-info/RECORD")
