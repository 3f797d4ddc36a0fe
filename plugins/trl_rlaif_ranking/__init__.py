"""The labeler `ranking`: rewards each response for the other responses to its prompt that it beats."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_ranking.labeler import RankingLabeler

__all__ = ["RankingLabeler"]


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("ranking", RankingLabeler)
