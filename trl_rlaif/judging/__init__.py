"""A language model as judge: its prompt, its exact probabilities, and what they say about a pair."""
