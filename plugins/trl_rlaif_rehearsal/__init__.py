"""Data selectors: prompts and rehearsal pairs for PPO, and responses for rejection sampling."""

from __future__ import annotations

from trl_rlaif import hookimpl
from trl_rlaif_rehearsal.prompts import PromptSelection
from trl_rlaif_rehearsal.rejection import RejectionSampling
from trl_rlaif_rehearsal.selective import SelectiveRehearsal

__all__ = ["PromptSelection", "RejectionSampling", "SelectiveRehearsal"]


@hookimpl
def register_data_selectors(register):
    """Register every selector under its name."""
    register("selective_rehearsal", SelectiveRehearsal)
    register("prompt_selection", PromptSelection)
    register("rejection_sampling", RejectionSampling)
