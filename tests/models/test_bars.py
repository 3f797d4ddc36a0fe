"""A GGUF file is converted without the progress bars of libraries, which are restored afterwards."""

from __future__ import annotations

from transformers import modeling_gguf_pytorch_utils as reader
from transformers.utils import logging

from trl_rlaif.models.loading import _without_bars


def test_bars_are_off_inside_and_back_afterwards(capsys):
    before, shown = reader.tqdm, logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    with _without_bars():
        assert list(reader.tqdm([1, 2], desc="Converting")) == [1, 2]
        assert list(logging.tqdm([1, 2], desc="Writing")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert reader.tqdm is before and logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
