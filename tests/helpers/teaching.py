"""Training data for a tiny judge (pairs with an obviously better response), and its training settings."""

from __future__ import annotations

from typing import Any

from helpers.recipes import WORDS

LONG = "the quick brown fox jumps over the lazy dog. it is the capital of a country."
TRAINED = {
    "num_train_epochs": 12, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "evaluations": 4, "patience": 4,
}  # fmt: skip


def judged_pairs(count: int) -> list[dict[str, Any]]:
    """Pairs in which the long response is better, first and second in turn."""
    rows = []
    for i in range(count):
        responses = [f"the {WORDS[i % 10]}. {LONG}", f"no {WORDS[(i + 3) % 10]}"]
        human = 1 + i % 2
        one, other = responses if human == 1 else responses[::-1]
        prompt = f"what is the {WORDS[i % 10]} {i}?"
        rows.append({"id": f"p{i}", "prompt": prompt, "response_1": one, "response_2": other, "human": human})
    return rows
