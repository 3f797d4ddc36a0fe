"""The model table on a small scale: its checks of real tokenizers, on tokenizers built here with their features."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from helpers.templates import CHANNELS, OPENED, QWEN
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer

from trl_rlaif.encoding import usable_tokenizer

# By path: modules in benchmarks/ share names with folders here.
_SPEC = importlib.util.spec_from_file_location(
    "tokenizer_checks", Path(__file__).resolve().parents[1] / "benchmarks" / "tokenizer_checks.py"
)
tokenizer_checks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tokenizer_checks)


def make(template, *, added=(), special=(), pad="<|pad|>"):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([*special], special_tokens=True)
    tokenizer.add_tokens([*added])
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    return usable_tokenizer(tokenizer)


MADE = {
    "several stop tokens": lambda: make(CHAT_TEMPLATE.replace("<|end|>", "<turn>"), special=["<turn>"]),
    "tags that are not special": lambda: make(CHAT_TEMPLATE, added=["<table>", "<tool_call>", "</tool_call>"]),
    "padding that is the end": lambda: make(CHAT_TEMPLATE, pad="<|end|>"),
    "thoughts": lambda: make(QWEN, added=["<think>", "</think>"]),
    "thoughts that the prompt opens": lambda: make(OPENED, added=["<think>", "</think>"]),
    "channels": lambda: make(CHANNELS, special=["<|channel|>", "<|message|>", "<|close|>"]),
    "no template": lambda: make(None),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: maker() for name, maker in MADE.items()}


@pytest.mark.parametrize("check", [name for [name] in tokenizer_checks.CELLS])
@pytest.mark.parametrize("kind", MADE)
def test_no_cell_is_wrong(tokenizers, kind, check):
    assert "wrong" not in tokenizer_checks.CELLS[check,](tokenizers[kind])


def test_a_cell_can_be_wrong(tokenizers, monkeypatch):
    """Each check detects its own fault."""
    monkeypatch.setattr(tokenizer_checks, "end_of_turn", lambda tokenizer: 5)
    assert "wrong" in tokenizer_checks.end(tokenizers["several stop tokens"])
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_checks, "encode_response", lambda tokenizer, text: [5])
    assert "wrong" in tokenizer_checks.tags(tokenizers["thoughts"])
    monkeypatch.setattr(tokenizer_checks, "encode_prompt", lambda *_, **options: [5, 6])
    assert "wrong" in tokenizer_checks.ending(tokenizers["thoughts"])
    broken = make_tokenizer()
    broken.pad_token = broken.eos_token
    assert "wrong" in tokenizer_checks.padding(broken)
