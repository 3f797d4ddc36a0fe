"""What a model's revision depends on."""

from __future__ import annotations

import pytest
from helpers.tiny import save_tiny_model

from trl_rlaif.models import model_revision


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_revision_changes_with_each_file_that_decides_on_answers(tmp_path, name):
    folder = save_tiny_model(tmp_path)
    before = model_revision(folder)
    assert model_revision(folder) == before
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    # A broken config cannot be loaded, and need not be: the folder's files are read as they are.
    assert model_revision(folder) != before


def test_other_files_change_nothing(tmp_path):
    folder = save_tiny_model(tmp_path)
    before = model_revision(folder)
    (tmp_path / "README.md").write_text("new")
    assert model_revision(folder) == before
