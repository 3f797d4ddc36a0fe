"""The labeler `distilled`: soft labels from a judge's token probabilities in both orders (Lee et al. 2023)."""

from trl_rlaif import hookimpl
from trl_rlaif_distilled.labeler import DistilledLabeler, DistilledOptions

__all__ = ["DistilledLabeler", "DistilledOptions"]


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("distilled", DistilledLabeler)
