"""The GPU measurement runs from end to end on a CPU, where it has a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_tiny_model_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    options = ["--size", "tiny", "--device", "cpu", "--only", "ours", "--updates", "1", "--output", str(output)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(output.read_text())
    ours = record["ours"]
    assert "error" not in ours, done.stderr
    assert len(ours["updates"]) == 1
    assert ours["seconds"]["generation"] > 0 and ours["seconds"]["update"] > 0
    assert ours["gib"].keys() == {"resident"}
    assert ours["predicted_gib"] > 0
    assert "measured_over_predicted" not in ours  # a CPU's resident set is not what was predicted
    assert "tiny" in done.stdout
