"""Storing, calibrating and comparing a run's labels."""

from trl_rlaif.labels.store import LabelKey, LabelStore

__all__ = ["LabelStore", "LabelKey"]
