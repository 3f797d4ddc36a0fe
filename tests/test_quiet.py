"""Every command hides libraries' progress bars and warnings; from Python, nothing is silenced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import datasets
import pytest
from helpers.trained import add_trained, make_run
from transformers.utils import logging

from trl_rlaif.export import ExportOptions, export_model
from trl_rlaif.rewardbench import run_benchmark

# Replaces a command's own work by output of libraries, each in its own way.
LOUD = """
import logging, sys, warnings

def loud():
    from datasets.utils import tqdm
    from transformers.utils import logging as of_transformers

    list(of_transformers.tqdm([1], desc="Loading weights"))
    list(tqdm([1], desc="Map"))
    of_transformers.get_logger("transformers.modeling").warning("new weights")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernel")
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)  # as its import does
    deepspeed.addHandler(logging.StreamHandler(sys.stdout))
    deepspeed.warning("no GPU")
    warnings.warn("is deprecated", FutureWarning)
    warnings.warn("'pin_memory' argument is set as true but no accelerator is found")
    logging.getLogger("bitsandbytes").error("an error")

from trl_rlaif import cli
cli.app = loud
cli.main()
"""


def test_commands_show_no_library_at_work():
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "TQDM_"))
    }
    ended = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, check=True, env=environment)
    assert (ended.stdout, ended.stderr) == ("", "an error\n")
    loud = environment | {"TRANSFORMERS_VERBOSITY": "warning", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    ended = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, check=True, env=loud)
    assert "Loading weights" in ended.stderr and "new weights" in ended.stderr  # as set by the user


@pytest.fixture
def shown():
    """Progress bars of transformers and datasets, and warnings, as in a fresh process."""
    before = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled(), logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cannot enable progress bars")
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
    logging.set_verbosity_warning()
    yield _state
    if not before[0]:
        logging.disable_progress_bar()
    if before[1]:
        datasets.disable_progress_bars()
    logging.set_verbosity(before[2])


def _state():
    bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    return *bars, logging.get_verbosity(), list(warnings.filters), dict(os.environ)


def test_from_python_nothing_is_silenced(shown, tiny_model, tmp_path):
    before = shown()
    run = add_trained(make_run(tmp_path, tiny_model), "reward")
    export_model(run.path, "reward", ExportOptions(merge=True))
    source = tmp_path / "bench.jsonl"
    source.write_text(json.dumps({"prompt": "what is 1?", "chosen": "a city", "rejected": "no"}))
    run_benchmark(run.path, source)
    assert shown() == before
