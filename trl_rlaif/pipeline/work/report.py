"""The report: one HTML file from the other stages' outputs."""

from __future__ import annotations

import time

from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.results import ReportResults
from trl_rlaif.progress import progress_bar
from trl_rlaif.report.build import write_report


def run(context: Context) -> ReportResults:
    """Write ``report.html``."""
    started = time.monotonic()
    with progress_bar("Writing the report", 1) as advance:
        path = write_report(context.folder.path)
        advance(1)
    return {"path": path.name, "seconds": time.monotonic() - started}
