"""No test reaches a hub; torch uses one thread, which on tiny models is many times faster than two."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402  (after the environment is set)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny chat model with its tokenizer."""
    from helpers.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))
