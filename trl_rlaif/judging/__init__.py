"""A language model as judge: its prompt, its exact probabilities, and what they say of a pair."""

from trl_rlaif.judging.judge import Judge
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.judging.question import Answer, Question, Thinking, ThinkingOptions

__all__ = ["Answer", "Judge", "JudgePrompt", "LocalJudge", "Question", "Thinking", "ThinkingOptions"]
