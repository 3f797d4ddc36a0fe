"""Measures with their intervals (methods.md, section 6)."""

from trl_rlaif.measures.intervals import bootstrap_mean, wilson
from trl_rlaif.measures.labels import agreement, position_bias, summarize_mass
from trl_rlaif.measures.winrate import win_rate

__all__ = ["agreement", "bootstrap_mean", "position_bias", "summarize_mass", "wilson", "win_rate"]
