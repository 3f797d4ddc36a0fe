"""Metrics with confidence intervals."""

from trl_rlaif.evaluation.calibration import calibration_bins, calibration_error, outcome_calibration_error
from trl_rlaif.evaluation.categories import by_category, category_figures
from trl_rlaif.evaluation.intervals import (
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    share_interval,
    standard_error,
    wilson,
)
from trl_rlaif.evaluation.judges import cohen_kappa, fleiss_kappa, judge_agreement
from trl_rlaif.evaluation.labels import (
    agreement,
    compare_agreement,
    length_preference,
    position_bias,
    summarize_mass,
)
from trl_rlaif.evaluation.length_control import compare_lengths, length_controlled_win_rate
from trl_rlaif.evaluation.rates import (
    agreement_points,
    all_against_all,
    choices,
    harmless_rate,
    is_even,
    pairwise_accuracy,
    points,
    win_rate,
)

__all__ = [
    "agreement",
    "agreement_points",
    "all_against_all",
    "bootstrap",
    "bootstrap_mean",
    "bootstrap_ratio",
    "by_category",
    "calibration_bins",
    "calibration_error",
    "category_figures",
    "choices",
    "cohen_kappa",
    "compare_agreement",
    "compare_lengths",
    "fleiss_kappa",
    "harmless_rate",
    "is_even",
    "judge_agreement",
    "length_controlled_win_rate",
    "length_preference",
    "outcome_calibration_error",
    "pairwise_accuracy",
    "points",
    "position_bias",
    "share_interval",
    "standard_error",
    "summarize_mass",
    "wilson",
    "win_rate",
]
