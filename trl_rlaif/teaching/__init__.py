"""Teaching a judge: synthetic contrast pairs, and training an adapter on the judge's own prompts."""

from trl_rlaif.teaching.contrasts import KINDS, Contrast, make_contrasts
from trl_rlaif.teaching.lessons import Lesson

__all__ = ["KINDS", "Contrast", "Lesson", "make_contrasts"]
