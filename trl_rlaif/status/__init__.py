"""Shows a run's status from another process."""

from trl_rlaif.status.showing import describe, follow, show
from trl_rlaif.status.snapshot import Bar, StageStatus, Status, read_status

__all__ = ["Bar", "StageStatus", "Status", "describe", "follow", "read_status", "show"]
