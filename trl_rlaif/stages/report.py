"""The report: one HTML file from what the other stages left."""

from __future__ import annotations

from typing import Any

from trl_rlaif.report import write_report
from trl_rlaif.stages.context import Context


def run(context: Context) -> dict[str, Any]:
    """Write ``report.html``."""
    return {"path": write_report(context.folder.path).name}
