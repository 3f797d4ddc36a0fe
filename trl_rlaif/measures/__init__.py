"""Measures with their intervals (methods.md, section 6)."""

from trl_rlaif.measures.calibration import calibration_error
from trl_rlaif.measures.categories import category_figures
from trl_rlaif.measures.intervals import bootstrap_mean, wilson
from trl_rlaif.measures.labels import agreement, compare_agreement, position_bias, summarize_mass
from trl_rlaif.measures.winrate import win_rate

__all__ = [
    "agreement",
    "bootstrap_mean",
    "calibration_error",
    "category_figures",
    "compare_agreement",
    "position_bias",
    "summarize_mass",
    "wilson",
    "win_rate",
]
