"""Llamas of published shapes with random weights, saved as a checkpoint that transformers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHARD = 2 * 2**30


@dataclass(frozen=True)
class Size:
    """A Llama's shape, and the recipe for models like it.

    Args:
        like: The published model that has this shape.
        tokens: Default length of prompts and of responses.
    """

    like: str
    recipe: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    tokens: int = 256

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            dtype="bfloat16",
        )


SIZES = {
    "tiny": Size("none", "qlora_12gb", 64, 128, 2, 4, 2, 512, True, tokens=16),
    "1b": Size("Llama-3.2-1B", "qlora_8gb", 2048, 8192, 16, 32, 8, 128256, True),
    "1.5b": Size("Qwen2.5-1.5B", "qlora_12gb", 1536, 8960, 28, 12, 2, 151936, True),
    "3b": Size("Llama-3.2-3B", "qlora_12gb", 3072, 8192, 28, 24, 8, 128256, True),
    "8b": Size("Llama-3-8B", "qlora_24gb", 4096, 14336, 32, 32, 8, 128256, False),
}


def make_model(size: Size, folder: Path, device: str) -> None:
    """Make a random bfloat16 checkpoint, generated and saved 2 GiB at a time; config.json comes last."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(size.config())
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        shard[name] = (tensor.normal_(std=0.02) if parameter.dim() > 1 else tensor).cpu()
        if sum(t.nbytes for t in shard.values()) >= _SHARD or len(index) + len(shard) == len(names):
            file = f"model-{len(set(index.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    total = 2 * sum(p.numel() for p in names.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    _tokenizer(size.vocab).save_pretrained(folder)
    size.config().save_pretrained(folder)


def _tokenizer(vocab: int) -> Any:
    """A word for every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), vocab)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
