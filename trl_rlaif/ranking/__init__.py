"""Rankings of several responses out of comparisons: strengths, and which comparison to ask next."""
