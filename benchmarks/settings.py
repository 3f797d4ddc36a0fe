"""Common settings of the small training runs in several benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# On a CPU in float32, with nothing written to disk and nothing printed.
QUIET: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def word_tokenizer(index: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, including ``<pad>`` and ``<end>``."""
    backend = Tokenizer(models.WordLevel(dict(index), unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left")
