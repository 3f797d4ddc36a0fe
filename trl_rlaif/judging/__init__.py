"""A language model as judge: its prompt, its exact probabilities, and what they say of a pair."""

from trl_rlaif.judging.judge import Judge
from trl_rlaif.judging.prompt import JudgePrompt

__all__ = ["Judge", "JudgePrompt"]
