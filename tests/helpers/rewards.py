"""Reward functions with GRPOTrainer's signature."""

from __future__ import annotations


def length_penalty(prompts, completions, completion_ids, **columns):
    """Minus the number of tokens, in tens."""
    return [-len(ids) / 10 for ids in completion_ids]


def even_share(prompts, completions, completion_ids, **columns):
    """Share of tokens with an even id: it differs between responses of the same length."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def not_a_number(prompts, completions, **columns):
    """NaN for the last completion."""
    return [0.0] * (len(prompts) - 1) + [float("nan")]
