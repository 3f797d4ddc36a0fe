"""No test accesses the Hub; torch uses one thread, which is many times faster than two on tiny models."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402  (after the environment is set)
from helpers.gpu_benchmarks import sides  # noqa: E402, F401  (a fixture)

# The slowest files, slowest first: xdist distributes files in order, and a slow one at the end delays the run.
_LONGEST = [
    "test_docs_commands.py", "test_benchmarks_gpu.py", "test_pretended_gpu.py", "test_packaged_recipes.py",
    "test_third_party.py", "test_processes.py", "test_rejection.py", "test_kill.py", "test_run.py", "test_trainer.py",
    "test_several.py", "test_fsdp.py", "test_experiment_run.py", "test_calibration.py", "test_report_page.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """Freezes all objects so far: garbage collection after each stage of a run then takes 3 ms instead of 300."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny chat model with its tokenizer."""
    from helpers.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", autouse=True)
def savefig():
    """Reports get empty plots, since drawing takes most of a tiny run's time. Returns the original ``savefig``."""
    from matplotlib.figure import Figure

    draws, empty = Figure.savefig, b'<svg viewBox="0 0 1 1"/>'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **options: file.write(empty))
        yield draws


@pytest.fixture
def drawn(savefig, monkeypatch):
    """Plots are really drawn."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(scope="session", autouse=True)
def remembered_here(tmp_path_factory):
    """The cache of `check` belongs to this session only."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_rlaif.remembered.cache_dir", lambda: folder)
        yield


@pytest.fixture
def only_local_servers(monkeypatch):
    """Server judges are only asked on this machine, whatever key, address and proxy the user has set."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session", autouse=True)
def deprecations():
    """Libraries' deprecation warnings, which commands hide, are errors here (pyproject.toml lists exceptions)."""
    from trl_rlaif import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "quiet_libraries", lambda: None)
        yield
