"""Rankings of several responses out of comparisons: strengths, and which comparison to ask next."""

# Where nobody says, a tournament asks one of so many questions about a prompt, which are its pairs in both orders.
SHARE = 3
