"""What a run is doing, told by another process than its own."""

from trl_rlaif.status.reading import Bar, StageStatus, Status, read_status
from trl_rlaif.status.showing import describe, follow, show

__all__ = ["Bar", "StageStatus", "Status", "describe", "follow", "read_status", "show"]
