"""No test reaches a hub; torch uses one thread, which on tiny models is many times faster than two."""

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

# What takes longest, in this order: xdist hands files out as they come, and one that begins last is waited for.
_LONGEST = [
    "test_benchmarks_gpu.py", "test_pretended_gpu.py", "test_packaged_recipes.py", "test_third_party.py",
    "test_processes.py", "test_rejection.py", "test_kill.py", "test_run.py", "test_trainer.py", "test_several.py",
    "test_fsdp.py", "test_experiment_run.py", "test_calibration.py", "test_report_page.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """What is imported by now stays: collecting after each stage of a run then takes 3 ms and not 300."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny chat model with its tokenizer."""
    from helpers.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", autouse=True)
def savefig():
    """A report has all of its plots, but empty: drawing takes most of a tiny run. What draws them is returned."""
    from matplotlib.figure import Figure

    draws, empty = Figure.savefig, b'<svg viewBox="0 0 1 1"/>'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **options: file.write(empty))
        yield draws


@pytest.fixture
def drawn(savefig, monkeypatch):
    """The plots are drawn."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(scope="session", autouse=True)
def remembered_here(tmp_path_factory):
    """What `check` remembers is of this session alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_rlaif.remembered.cache_dir", lambda: folder)
        yield


@pytest.fixture
def only_local_servers(monkeypatch):
    """Judges on servers are asked here, whatever key, address and proxy the user has set."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session", autouse=True)
def deprecations():
    """A command hides from its user what libraries deprecate; here it is an error (pyproject.toml names exceptions)."""
    from trl_rlaif import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "quiet_libraries", lambda: None)
        yield
