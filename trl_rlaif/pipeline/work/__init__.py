"""What the stages do, a module each, imported when its stage runs; of rl one for each kind of algorithm."""
