"""Teaching a judge: contrasts that need no person, and the training of an adapter on the judge's own questions."""

from trl_rlaif.teaching.contrasts import KINDS, Contrast, make_contrasts

__all__ = ["KINDS", "Contrast", "make_contrasts"]
