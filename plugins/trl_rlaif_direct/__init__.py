"""The labeler `direct`: a judge rates one response from 1 to 10, which gives its reward (Lee et al. 2023)."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_direct.labeler import DirectLabeler

__all__ = ["DirectLabeler"]


@hookimpl
def register_labelers(register):
    """Register the labeler under its name."""
    register("direct", DirectLabeler)
