"""What a run is doing, told by another process than its own."""

from trl_rlaif.status.showing import describe, follow, show
from trl_rlaif.status.snapshot import Bar, StageStatus, Status, read_status

__all__ = ["Bar", "StageStatus", "Status", "describe", "follow", "read_status", "show"]
