"""Labels as a run keeps, calibrates and compares them."""

from trl_rlaif.labels.calibration import Calibration
from trl_rlaif.labels.store import LabelStore, Setup

__all__ = ["Calibration", "LabelStore", "Setup"]
