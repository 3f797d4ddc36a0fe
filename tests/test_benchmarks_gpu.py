"""The kit for a GPU machine runs end to end on a CPU with a tiny model."""

import importlib
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
    """The steps for the GPU machine in their order, except for stock TRL and smaller GPUs."""
    out, steps = tmp_path / "out", ("checks", "model8b", "speed", "ablation", "pairs", "padded")
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
    records = json.loads((out / "gpu.json").read_text())
    ours, ablated, padded = (record["ours"] for record in records)
    assert not any("error" in side for side in (ours, ablated, padded))
    assert [record["setting"]["padded"] for record in records] == [False, False, True]
    assert padded["seconds"]["generation"] > 0
    assert len(ours["updates"]) == 1 and ours["seconds"]["generation"] > 0 and ours["seconds"]["update"] > 0
    assert ours["gib"].keys() == {"resident"} and ours["predicted_gib"] > 0
    assert "measured_over_predicted" not in ours  # the prediction is not of a CPU's resident set
    updates = ablated["ablation"]
    off = [update["without"] for update in updates]
    assert off == ["", "", "fused_lora", "cast_weights", "logprob_head", "all", ""]
    assert all(update["seconds"]["generation"] > 0 for update in updates)
    assert b"checks ok" in done.stdout


def test_stock_has_no_paged_optimizer_where_all_of_its_value_model_is_trained(sides):
    arguments, known = {"optim": "paged_adamw_8bit", "bf16": True, "value": "adapter"}, {"optim", "bf16"}
    assert sides.stock_arguments(arguments, known, nf4=False) == {"optim": "adamw_8bit", "bf16": True}
    assert sides.stock_arguments(arguments, known, nf4=True) == {"optim": "paged_adamw_8bit", "bf16": False}
    assert sides.stock_arguments({"bf16": True}, known, nf4=False) == {"bf16": True}


def test_padded_prompts_have_real_lengths(sides):
    lengths = sides.prompt_lengths(32, 256)
    assert (min(lengths), max(lengths)) == (64, 256) and len(set(lengths)) == 32 and lengths != sorted(lengths)
    assert sides.prompt_lengths(1, 256) == [256] and sides.prompt_lengths(2, 3) in ([1, 3], [3, 1])


@pytest.mark.parametrize("cuda", [True, False])
def test_reward_training_is_measured_where_it_is_asked_to(sides, monkeypatch, cuda):
    import trl
    from datasets import Dataset

    class Stop(Exception):
        pass

    def stop(*_, use_cpu, **__):
        raise Stop(use_cpu)

    reward = importlib.import_module("reward")
    monkeypatch.setattr(trl, "RewardConfig", stop)
    monkeypatch.setattr(reward, "_dataset", lambda args: Dataset.from_list([]))
    monkeypatch.setattr("trl_rlaif.models.loading.load_model", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["reward.py", "data", "--side", "ours", *(["--cuda"] if cuda else [])])
    with pytest.raises(Stop) as stopped:
        reward._measure(reward._arguments())
    assert stopped.value.args == (not cuda,)


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
