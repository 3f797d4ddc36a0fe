"""The page that a run leaves behind: one HTML file that says in plain words what came out."""

from trl_rlaif.report.build import write_report

__all__ = ["write_report"]
