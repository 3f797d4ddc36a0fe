"""Labels as a run keeps, calibrates and compares them."""

from trl_rlaif.labels.store import LabelKey, LabelStore

__all__ = ["LabelStore", "LabelKey"]
