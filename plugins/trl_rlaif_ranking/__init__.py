"""The labeler `ranking`: responses to one prompt are rewarded for those among them that they beat."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_ranking.labeler import RankingLabeler

__all__ = ["RankingLabeler"]


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("ranking", RankingLabeler)
