"""Experiments: runs the variants of one recipe, has them judged against each other, and compares finished runs."""

from trl_rlaif.experiments.running import run_comparison

__all__ = ["run_comparison"]
