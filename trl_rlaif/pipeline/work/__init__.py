"""The stages' implementations, each imported when its stage runs; rl has a module per kind of algorithm."""
