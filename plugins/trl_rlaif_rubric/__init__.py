"""The labeler `rubric`: a judge checks a response against criteria; the reward is the weighted fraction met."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_rubric.labeler import RubricLabeler
from trl_rlaif_rubric.rubric import Criterion, grade, read_rubric

__all__ = ["Criterion", "RubricLabeler", "grade", "read_rubric"]


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("rubric", RubricLabeler)
