"""Tiny models, tokenizers and datasets, made on the spot."""
