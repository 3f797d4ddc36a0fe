"""A language model as judge: its prompt, its exact probabilities, and labels from them."""
