"""Teaching a judge: contrasts that need no person, and the training of an adapter on the judge's own questions."""

from trl_rlaif.teaching.contrasts import KINDS, Contrast, make_contrasts
from trl_rlaif.teaching.lessons import Lesson

__all__ = ["KINDS", "Contrast", "Lesson", "make_contrasts"]
