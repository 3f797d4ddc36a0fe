"""Several ways of aligning one start, from one recipe: run, judged against each other, and laid side by side."""

from trl_rlaif.experiments.running import run_comparison

__all__ = ["run_comparison"]
