"""Rankings of several responses from pairwise comparisons: strengths, and which comparison to ask next."""
