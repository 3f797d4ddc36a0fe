"""Forward and backward pass of the attention implementations that PPO chooses from, on a CPU, in ms.

python benchmarks/attention.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from trl_rlaif.models.kernels.attention import _bias, whole_attention

ROWS, HEADS, KEY_HEADS, WIDTH = 8, 9, 3, 64  # SmolLM2-135M's, at batch 8


def main() -> None:
    """Print a row per implementation, a column per length."""
    lengths = (96, 160, 224, 320)
    print(f"{'tokens':20}" + "".join(f"{length:8}" for length in lengths))
    for name in ("torch, bfloat16", "torch, float32", "whole_attention"):
        print(f"{name:20}" + "".join(f"{_fastest(name, length):8.1f}" for length in lengths), flush=True)


def _fastest(name: str, length: int) -> float:
    def draw(heads: int) -> torch.Tensor:
        return torch.randn(ROWS, length, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()

    q, k, v = draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS)
    direction, bias = torch.randn_like(q), _bias(None, length)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "torch, bfloat16": lambda: torch_attention(q, k, v, is_causal=True, enable_gqa=True),
        "torch, float32": lambda: torch_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True).to(
            q.dtype
        ),
        "whole_attention": lambda: whole_attention(q, k, v, bias, WIDTH**-0.5),
    }
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        ways[name]().backward(direction)
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds)


if __name__ == "__main__":
    main()
