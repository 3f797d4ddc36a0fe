"""Several ways of aligning one start, from one recipe: run, judged against each other, and laid side by side."""

from trl_rlaif.comparison.running import ARMS_FOLDER, run_comparison

__all__ = ["ARMS_FOLDER", "run_comparison"]
