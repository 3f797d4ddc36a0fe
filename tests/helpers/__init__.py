"""Shared test helpers: tiny models, tokenizers, data, recipes and servers."""
