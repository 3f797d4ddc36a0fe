"""Labels as a run keeps, calibrates and compares them."""

from trl_rlaif.labels.store import LabelStore, Setup

__all__ = ["LabelStore", "Setup"]
