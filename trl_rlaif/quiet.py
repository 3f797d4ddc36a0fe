"""Silences other libraries' messages in commands; nothing is silenced when the package is used from Python."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Libraries read these at import. Values set by the user are kept, and child processes inherit them.
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def quiet_libraries() -> None:
    """Hide progress bars, deprecation warnings and advice of libraries, which must not be imported yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It warns at import about a faster kernel that could be downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It warns on stdout that there is no GPU, and sets its own level at import; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    if not sys.warnoptions:  # python -W
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        warnings.filterwarnings("ignore", category=FutureWarning)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
