"""The labeler `ranking`: rewards each response by how often it beats the other responses to its prompt."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_ranking.labeler import RankingLabeler

__all__ = ["RankingLabeler"]


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("ranking", RankingLabeler)
