"""Human evaluation: blind side-by-side comparisons in a local web page, and win rates from the votes."""

from trl_rlaif.rating.pairs import Comparison, read_comparisons
from trl_rlaif.rating.results import describe, people_results
from trl_rlaif.rating.server import rate_run

__all__ = ["Comparison", "describe", "people_results", "rate_run", "read_comparisons"]
